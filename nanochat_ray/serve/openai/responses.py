"""``/v1/responses``: request to the chat request that it stands for, and its generation request.

Nothing is stored, since any of several servers may get the next request: a client sends the whole
conversation as ``input``, as it does with ``store=false`` at OpenAI.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from nanochat_ray.serve.body import from_validation
from nanochat_ray.serve.generation import GenerationRequest
from nanochat_ray.serve.openai import errors
from nanochat_ray.serve.openai.chat import parse_chat
from nanochat_ray.serve.openai.errors import ApiError
from nanochat_ray.serve.openai.schema.requests import (
    CallOfFunction,
    ChatMessage,
    ChatRequest,
    ToolCall,
)
from nanochat_ray.serve.openai.schema.responses import ResponsesRequest
from nanochat_ray.serve.openai.schema.structured_outputs import ResponseFormat
from nanochat_ray.serve.openai.serving import Serving
from nanochat_ray.serve.openai.tools import FunctionSpec, NamedTool, ToolSpec

ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
LOGPROBS = "message.output_text.logprobs"
CHAT_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "messages": "input",
}
"""Fields of a chat request in error messages, and their names here."""


async def parse_responses(
    serving: Serving, body: ResponsesRequest, client: str
) -> GenerationRequest:
    """ApiError names the fields of the request that was sent."""
    try:
        chat = _chat_request(body)
        try:
            return await parse_chat(serving, chat, client)
        except ApiError as error:
            if error.code != "context_length_exceeded" or body.truncation != "auto":
                raise
            return await _truncate(serving, chat, client, error)
    except ApiError as error:
        for name, ours in CHAT_NAMES.items():
            error.message = error.message.replace(name, ours)
            error.param = error.param and error.param.replace(name, ours)
        raise error from None
    except ValueError as error:
        name_of_field = re.match(r"[\w.\[\]]*", str(error))
        raise errors.invalid(str(error), name_of_field and name_of_field[0]) from None


async def _truncate(
    serving: Serving, chat: ChatRequest, client: str, failure: ApiError
) -> GenerationRequest:
    """With as many of the newest turns as fit; ``failure`` if not even the last one does."""
    messages = chat.messages
    system = 0
    while system < len(messages) and messages[system].role in ("system", "developer"):
        system += 1
    starts = [i for i in range(system + 1, len(messages)) if messages[i].role == "user"]
    generation: GenerationRequest | None = None
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        newest = [*messages[:system], *messages[starts[middle] :]]
        try:
            shorter = chat.model_copy(update={"messages": newest})
            generation = await parse_chat(serving, shorter, client)
            high = middle
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            low = middle + 1
    if generation is None:
        raise failure
    return generation


def _chat_request(body: ResponsesRequest) -> ChatRequest:
    """The chat request that asks for the same; its parts are validated here, each once."""
    messages = _messages(body.input)
    if body.instructions:
        messages.insert(0, ChatMessage.model_construct(role="system", content=body.instructions))
    response_format = _response_format(body)
    tools = [_tool(tool, i) for i, tool in enumerate(body.tools or ())]
    if body.max_output_tokens == 0:
        raise ValueError("max_output_tokens=0 is not allowed: 1 or more, or -1 for all that fits")
    if body.cache_salt == "":
        raise ValueError("cache_salt: String should have at least 1 character")
    chat = ChatRequest.model_construct(
        model=body.model,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stream=body.stream,
        seed=body.seed,
        cache_salt=body.cache_salt,
        response_format=response_format,
        tools=tools or None,
        tool_choice=_tool_choice(body.tool_choice),
        logprobs=bool(body.top_logprobs) or LOGPROBS in (body.include or []),
        top_logprobs=body.top_logprobs,
    )
    _ = chat.effective_tool_choice  # ValueError if the choice is not among the tools
    return chat


def _validate(kind: Any, value: Any, *location: str | int) -> Any:
    """``value`` as ``kind``. ApiError names the first field that is wrong."""
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise from_validation([{**first, "loc": ("body", *location, *first["loc"])}]) from None


def _response_format(body: ResponsesRequest) -> ResponseFormat | None:
    options = None if body.text is None else body.text.format
    if options is None:
        return None
    if options.get("type") not in ("text", "json_object"):
        if options.get("type") != "json_schema" or not isinstance(options.get("schema"), dict):
            raise ValueError(
                f"text.format={options!r:.80} is not allowed: the type text, json_object, or "
                "json_schema with a schema"
            )
        schema = {name: options[name] for name in ("name", "schema") if name in options}
        options = {"type": "json_schema", "json_schema": schema}
    return _validate(ResponseFormat, options, "text", "format")


def _tool_choice(choice: Any) -> Any:
    if isinstance(choice, dict):
        if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
            raise ValueError(
                f"tool_choice={choice!r:.80} is not allowed: none, auto, required, or "
                "{type: function, name: …}"
            )
        choice = {"type": "function", "function": {"name": choice["name"]}}
    kinds = Literal["none", "auto", "required"] | NamedTool | None
    return _validate(kinds, choice, "tool_choice")


def _tool(tool: Any, index: int) -> ToolSpec:
    at = f"tools[{index}]"
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise ValueError(f"{at}.type={kind!r:.80} is not supported: only function")
    if not isinstance(tool.get("name"), str):
        raise ValueError(f"{at}.name={tool.get('name')!r:.80} is not allowed: a string")
    function = _validate(FunctionSpec, tool, "tools", index)
    return ToolSpec.model_construct(type="function", function=function)


def _messages(items: str | list[Any]) -> list[ChatMessage]:
    """Items as chat messages: calls that follow an assistant's text are part of its message."""
    if isinstance(items, str):
        return [ChatMessage.model_construct(role="user", content=items)]
    messages: list[ChatMessage] = []
    for i, item in enumerate(items):
        at = f"input[{i}]"
        if not isinstance(item, dict):
            raise ValueError(f"{at}={item!r:.80} is not allowed: an object")
        kind = item.get("type", "message")
        if kind == "message":
            role = item.get("role")
            if role not in ROLES:
                raise ValueError(
                    f"{at}.role={role!r:.80} is not allowed: one of {', '.join(ROLES)}"
                )
            text = _text(item.get("content"), f"{at}.content")
            messages.append(ChatMessage.model_construct(role=role, content=text))
        elif kind == "function_call":
            call_id, name, arguments = (
                _string(item, field, at) for field in ("call_id", "name", "arguments")
            )
            function = CallOfFunction.model_construct(name=name, arguments=arguments)
            call = ToolCall.model_construct(id=call_id, function=function)
            if not messages or messages[-1].role != "assistant":
                messages.append(ChatMessage.model_construct(role="assistant"))
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
        elif kind == "function_call_output":
            result = _text(item.get("output"), f"{at}.output")
            call_id = _string(item, "call_id", at)
            messages.append(
                ChatMessage.model_construct(role="tool", tool_call_id=call_id, content=result)
            )
        elif kind != "reasoning":
            raise ValueError(
                f"{at}.type={kind!r:.80} is not supported: message, function_call, "
                "function_call_output"
            )
    if not messages:
        raise ValueError("input is empty: at least one message is needed")
    return messages


def _text(content: Any, at: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{at}={content!r:.80} is not allowed: a string or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        text = None
        if isinstance(part, dict) and kind in TEXT_PARTS:
            text = part.get("refusal" if kind == "refusal" else "text")
        if not isinstance(text, str):
            raise ValueError(f"{at}[{i}].type={kind!r:.80} is not supported: input_text")
        texts.append(text)
    return "".join(texts)


def _string(item: Mapping[str, Any], name: str, at: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{at}.{name}={value!r:.80} is not allowed: a string")
    return value
