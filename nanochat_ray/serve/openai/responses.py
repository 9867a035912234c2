"""``/v1/responses``: request to the chat request that it stands for, deltas to response or events.

Nothing is stored, since any of several servers may get the next request: a client sends the whole
conversation as ``input``, as it does with ``store=false`` at OpenAI.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from nanochat_ray.serve.body import from_validation
from nanochat_ray.serve.generation import Delta, GenerationRequest, LogprobPair
from nanochat_ray.serve.openai import errors, logprobs
from nanochat_ray.serve.openai.builder import ResponseBuilder
from nanochat_ray.serve.openai.chat import parse_chat
from nanochat_ray.serve.openai.errors import ApiError
from nanochat_ray.serve.openai.schema.outputs import TokenLogprob
from nanochat_ray.serve.openai.schema.requests import (
    CallOfFunction,
    ChatMessage,
    ChatRequest,
    ToolCall,
)
from nanochat_ray.serve.openai.schema.responses import (
    FunctionCallItem,
    OutputItem,
    OutputMessage,
    OutputText,
    ResponsesError,
    ResponsesRequest,
    ResponsesResponse,
    ResponsesUsage,
)
from nanochat_ray.serve.openai.schema.structured_outputs import ResponseFormat
from nanochat_ray.serve.openai.serving import Serving
from nanochat_ray.serve.openai.tools import FunctionSpec, NamedTool, ToolSpec
from nanochat_ray.serve.sse import event

T = TypeVar("T")
ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text", "refusal")
LOGPROBS = "message.output_text.logprobs"
CHAT_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "messages": "input",
}
"""Fields of a chat request in error messages, and their names here."""

# --- request ------------------------------------------------------------------------------------


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


# --- response -----------------------------------------------------------------------------------


class ResponsesBuilder(ResponseBuilder):
    object_name = "response"

    def __init__(self, serving: Serving, generation: GenerationRequest, body: ResponsesRequest):
        self._message_id = f"msg_{secrets.token_hex(12)}"
        super().__init__(serving, generation, f"resp_{secrets.token_hex(12)}")
        self._body = body
        self._num_events = 0
        self._has_message = self._has_call = False
        """Of a stream: whether the item has been added."""
        self._call: FunctionCallItem | None = None

    def add(self, delta: Delta) -> None:
        super().add(delta)
        call = self.choices[0].call
        if call is None:
            return
        item_id = self._call["id"] if self._call else f"fc_{secrets.token_hex(12)}"
        self._call = {
            "id": item_id,
            "type": "function_call",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "status": "in_progress" if delta.finish_reason is None else self._final_status(),
            "arguments": call["function"]["arguments"],
        }

    def _final_status(self) -> Literal["incomplete", "completed"]:
        return "incomplete" if self.choices[0].finish_reason == "length" else "completed"

    def _logprobs(self, tokens: list[LogprobPair]) -> list[TokenLogprob]:
        if not self.generation.logprobs:
            return []
        return logprobs.for_chat(self.serving.tokenizer, tokens)["content"]

    def _part(self) -> OutputText:
        choice = self.choices[0]
        scores = self._logprobs(choice.logprobs)
        return {
            "type": "output_text",
            "text": choice.text,
            "annotations": [],
            "logprobs": scores,
        }

    def _message(self, status: Literal["in_progress", "incomplete", "completed"]) -> OutputMessage:
        return {
            "id": self._message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": [] if status == "in_progress" else [self._part()],
        }

    def response(self) -> ResponsesResponse:
        status = self._final_status()
        output: list[OutputItem] = []
        if self.choices[0].text or self._call is None:
            output.append(self._message(status))
        if self._call is not None:
            output.append(self._call)
        return self._response(status, output)

    def _response(
        self,
        status: Literal["in_progress", "completed", "incomplete", "failed"],
        output: list[OutputItem],
        error: ResponsesError | None = None,
    ) -> ResponsesResponse:
        body = self._body
        has_ended = status in ("completed", "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.timestamp,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": error,
            "incomplete_details": (
                {"reason": "max_output_tokens"} if status == "incomplete" else None
            ),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.serving.name,
            "output": output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": self._usage() if has_ended else None,
        }

    def _usage(self) -> ResponsesUsage:
        usage = self.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }

    # --- events ---------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> str:
        name = f"response.{kind}"
        data = {"type": name, "sequence_number": self._num_events, **fields}
        self._num_events += 1
        return f"event: {name}\n{event(json.dumps(data))}"

    def opening(self) -> str:
        response = self._response("in_progress", [])
        return "".join(self._event(kind, response=response) for kind in ("created", "in_progress"))

    def chunks(self, delta: Delta) -> str:
        at = {"item_id": self._message_id, "output_index": 0, "content_index": 0}
        events = ""
        is_empty = delta.finish_reason is not None and self._call is None
        if not self._has_message and (delta.text or is_empty):
            self._has_message = True
            item, part = self._message("in_progress"), {**self._part(), "text": "", "logprobs": []}
            events += self._event("output_item.added", output_index=0, item=item)
            events += self._event("content_part.added", **at, part=part)
        if delta.text:
            scores = self._logprobs(delta.logprobs)
            events += self._event("output_text.delta", **at, delta=delta.text, logprobs=scores)
        if delta.tool_calls and self._call and not self._has_message:  # else after the message
            arguments = "".join(part.arguments for part in delta.tool_calls)
            events += self._call_delta(self._call, arguments)
        return events if delta.finish_reason is None else events + self._ending(at)

    def _call_delta(self, call: FunctionCallItem, arguments: str) -> str:
        index, events = int(self._has_message), ""
        if not self._has_call:
            self._has_call = True
            item = {**call, "status": "in_progress", "arguments": ""}
            events += self._event("output_item.added", output_index=index, item=item)
        if arguments:
            at = {"item_id": call["id"], "output_index": index}
            events += self._event("function_call_arguments.delta", **at, delta=arguments)
        return events

    def _ending(self, at: dict[str, Any]) -> str:
        events = ""
        if self._has_message:
            part, item = self._part(), self._message(self._final_status())
            text = {"text": part["text"], "logprobs": part["logprobs"]}
            events += self._event("output_text.done", **at, **text)
            events += self._event("content_part.done", **at, part=part)
            events += self._event("output_item.done", output_index=0, item=item)
        if (call := self._call) is not None:
            if not self._has_call:
                events += self._call_delta(call, call["arguments"])
            index = int(self._has_message)
            at = {"item_id": call["id"], "output_index": index, "name": call["name"]}
            events += self._event("function_call_arguments.done", **at, arguments=call["arguments"])
            events += self._event("output_item.done", output_index=index, item=call)
        return events

    def closing(self) -> str:
        return self._event(self._final_status(), response=self.response())

    def failure(self, error: ApiError) -> str:
        reason: ResponsesError = {
            "code": error.code or "server_error",
            "message": error.message,
        }
        return self._event("failed", response=self._response("failed", [], reason))
