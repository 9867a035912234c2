"""LangChain: an answer, a stream, and the calculator as a tool of its own."""

import sys

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

url = sys.argv[1]
chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="tiny", max_tokens=20, max_retries=0)
answer = chat.invoke("hello")
assert answer.content == "Grüße 🙂", answer
assert answer.usage_metadata["output_tokens"] > 3, answer
assert "".join(chunk.content for chunk in chat.stream("hello")) == "Grüße 🙂"


@tool
def calculator(expression: str) -> str:
    """Works out a sum."""
    return str(eval(expression, {"__builtins__": {}}))


messages = [HumanMessage("call")]
answer = chat.bind_tools([calculator]).invoke(messages)
(call,) = answer.tool_calls
assert call["args"] == {"expression": "12+7"}, answer
result = ToolMessage(calculator.invoke(call["args"]), tool_call_id=call["id"])
last = chat.bind_tools([calculator]).invoke([*messages, answer, result])
assert last.content == "Grüße 🙂", last
print("ok")
