"""``/v1/responses``: request to the chat request that it stands for, and its generation request.

Nothing is stored, since any of several servers may get the next request: a client sends the whole
conversation as ``input``, as it does with ``store=false`` at OpenAI.
"""

from __future__ import annotations

import dataclasses
import re

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
from nanochat_ray.serve.openai.schema.structured_outputs import JsonSchema, ResponseFormat
from nanochat_ray.serve.openai.tools import (
    AllowedTools,
    AllowedToolsChoice,
    AnyToolChoice,
    NamedFunction,
    NamedTool,
    ToolSpec,
)
from nanochat_ray.serve.responses.schema import (
    AllowedChoice,
    FunctionChoice,
    InputItem,
    ResponsesRequest,
    TextPart,
)
from nanochat_ray.serve.serving import Serving

LOGPROBS = "message.output_text.logprobs"
CHAT_NAMES = {"response_format": "text.format", "messages": "input"}
"""Fields of a chat request in error messages, and their names here."""


async def parse_responses(
    serving: Serving, body: ResponsesRequest, client: str
) -> GenerationRequest:
    """ApiError names the fields of the request that was sent."""
    try:
        chat, paths = _chat_request(body)
        try:
            generation = await parse_chat(serving, chat, client, paths)
        except ApiError as error:
            if error.code != "context_length_exceeded" or body.truncation != "auto":
                raise
            generation = await _truncate(serving, chat, client, paths, error)
    except ApiError as error:
        # Only at the start is a name a field; elsewhere it may be a word, or the client's text.
        for name, ours in CHAT_NAMES.items():
            error.message = re.sub(rf"^{name}\b", ours, error.message)
        error.param = CHAT_NAMES.get(error.param or "", error.param)
        raise error from None
    except ValueError as error:
        name_of_field = re.match(r"[\w.\[\]]*", str(error))
        raise errors.invalid(str(error), name_of_field and name_of_field[0]) from None
    field = CHAT_NAMES.get(generation.grammar_field, generation.grammar_field)
    return dataclasses.replace(generation, grammar_field=field)


async def _truncate(
    serving: Serving, chat: ChatRequest, client: str, paths: list[str], failure: ApiError
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
        newest = [*range(system), *range(starts[middle], len(messages))]
        try:
            shorter = chat.model_copy(update={"messages": [messages[i] for i in newest]})
            generation = await parse_chat(serving, shorter, client, [paths[i] for i in newest])
            high = middle
        except ApiError as error:
            if error.code != "context_length_exceeded":
                raise
            low = middle + 1
    if generation is None:
        raise failure
    return generation


def _chat_request(body: ResponsesRequest) -> tuple[ChatRequest, list[str]]:
    """The chat request that asks for the same, and where each of its messages comes from.
    ValueError begins with the name of a field."""
    messages, paths = _messages(body.input)
    if body.instructions:
        messages.insert(0, ChatMessage.model_construct(role="system", content=body.instructions))
        paths.insert(0, "instructions")
    if body.max_output_tokens == 0:
        raise ValueError("max_output_tokens=0 is not allowed: 1 or more, or -1 for all that fits")
    tools = [ToolSpec.model_construct(type="function", function=tool) for tool in body.tools or ()]
    chat = ChatRequest.model_construct(
        model=body.model,
        messages=messages,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        stream=body.stream,
        seed=body.seed,
        cache_salt=body.cache_salt,
        response_format=_response_format(body),
        tools=tools or None,
        tool_choice=_tool_choice(body),
        logprobs=bool(body.top_logprobs) or LOGPROBS in (body.include or []),
        top_logprobs=body.top_logprobs,
    )
    _ = chat.effective_tool_choice  # ValueError if the choice is not among the tools
    return chat, paths


def _tool_choice(body: ResponsesRequest) -> AnyToolChoice:
    choice = body.tool_choice
    if isinstance(choice, FunctionChoice):
        return _tool_of(choice)
    if not isinstance(choice, AllowedChoice):
        return choice
    names = [_tool_of(tool) for tool in choice.tools]
    subset = AllowedTools.model_construct(mode=choice.mode, tools=names)
    return AllowedToolsChoice.model_construct(type="allowed_tools", allowed_tools=subset)


def _tool_of(choice: FunctionChoice) -> NamedTool:
    function = NamedFunction.model_construct(name=choice.name)
    return NamedTool.model_construct(type="function", function=function)


def _response_format(body: ResponsesRequest) -> ResponseFormat | None:
    if body.text is None or (options := body.text.format) is None:
        return None
    if options.definition is None:
        return ResponseFormat.model_construct(type=options.type)
    schema = JsonSchema.model_construct(definition=options.definition)
    return ResponseFormat.model_construct(type="json_schema", json_schema=schema)


def _messages(items: str | list[InputItem]) -> tuple[list[ChatMessage], list[str]]:
    """Items as chat messages, and the path of each: calls that follow an assistant's text are part
    of its message, whose path is that of its first item."""
    if isinstance(items, str):
        return [ChatMessage.model_construct(role="user", content=items)], ["input"]
    messages: list[ChatMessage] = []
    paths: list[str] = []
    for i, item in enumerate(items):
        at = f"input[{i}]"
        if item.type == "message":
            if item.role is None:
                raise ValueError(f"{at}.role is missing: user, assistant, system or developer")
            text = _text(item.content, f"{at}.content")
            messages.append(ChatMessage.model_construct(role=item.role, content=text))
            paths.append(at)
        elif item.type == "function_call":
            function = CallOfFunction.model_construct(
                name=_string(item.name, f"{at}.name"),
                arguments=_string(item.arguments, f"{at}.arguments"),
            )
            call_id = _string(item.call_id, f"{at}.call_id")
            call = ToolCall.model_construct(id=call_id, function=function)
            if not messages or messages[-1].role != "assistant":
                messages.append(ChatMessage.model_construct(role="assistant"))
                paths.append(at)
            messages[-1].tool_calls = [*(messages[-1].tool_calls or ()), call]
        elif item.type == "function_call_output":
            text = _text(item.output, f"{at}.output")
            call_id = _string(item.call_id, f"{at}.call_id")
            messages.append(
                ChatMessage.model_construct(role="tool", tool_call_id=call_id, content=text)
            )
            paths.append(at)
    if not messages:
        raise ValueError("input has no message: at least one is needed")
    return messages, paths


def _text(content: str | list[TextPart] | None, at: str) -> str:
    if not isinstance(content, list):
        return _string(content, at)
    parts = [part.refusal if part.type == "refusal" else part.text for part in content]
    return "".join(_string(text, f"{at}[{i}].text") for i, text in enumerate(parts))


def _string(value: str | None, at: str) -> str:
    if value is None:
        raise ValueError(f"{at} is missing: a string is needed")
    return value
