"""OpenAI's ``/v1/responses``: its request, and the chat request that it stands for.

Nothing is stored, since any of several servers may get the next request: a client sends the whole
conversation as ``input``, as it does with ``store=false`` at OpenAI. Fields that change nothing
here are accepted and ignored; what would change the answer and is not built is refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from nanochat_ray.engine.request import MAX_LOGPROBS
from nanochat_ray.serve.conversation import Body
from nanochat_ray.serve.protocol import MaxTokens

Message = dict[str, Any]
"""A message as ``/v1/chat/completions`` takes it."""
ROLES = ("user", "assistant", "system", "developer")
TEXT_PARTS = ("input_text", "output_text", "text")
_STORED = "nothing is stored here, so send the whole conversation as input"
NOT_BUILT: dict[str, str] = {
    "background": "the answer is not kept for later",
    "conversation": _STORED,
    "previous_response_id": _STORED,
    "prompt": "there are no prompt templates",
}
LOGPROBS = "message.output_text.logprobs"


class TextOptions(Body):
    format: dict[str, Any] | None = None
    """text, json_object, or json_schema with its fields beside ``type``."""


class ResponsesRequest(Body):
    model: StrictStr | None = None
    input: StrictStr | list[Any]
    """Text, or items: messages, function calls and their outputs."""
    instructions: StrictStr | None = None
    """A system message before the input."""
    tools: list[Any] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    text: TextOptions | None = None
    max_output_tokens: MaxTokens | None = None
    temperature: Annotated[StrictFloat, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[StrictFloat, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: Annotated[list[Any], Field(max_length=16)] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """auto leaves out the oldest turns that do not fit into the context."""
    metadata: Annotated[dict[str, StrictStr], Field(max_length=16)] | None = None
    stream: StrictBool | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    """vLLM's."""
    cache_salt: StrictStr | None = None
    """vLLM's."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_built(cls, sent: Any) -> Any:
        if isinstance(sent, dict):
            for name, reason in NOT_BUILT.items():
                if sent.get(name) not in (None, False):
                    raise ValueError(f"{name} is not supported: {reason}")
        return sent

    def chat(self) -> dict[str, Any]:
        """The fields of the ``ChatRequest`` that asks for the same. Raises ValueError, naming the
        field."""
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [*system, *_messages(self.input)],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "seed": self.seed,
            "cache_salt": self.cache_salt,
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._response_format(),
        }
        if self.tools:
            fields["tools"] = [_tool(tool, f"tools[{i}]") for i, tool in enumerate(self.tools)]
        if self.tool_choice is not None:
            fields["tool_choice"] = self._tool_choice()
        if self.top_logprobs or LOGPROBS in (self.include or []):
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return {name: value for name, value in fields.items() if value is not None}

    def _response_format(self) -> dict[str, Any] | None:
        given = None if self.text is None else self.text.format
        if given is None or given.get("type") in ("text", "json_object"):
            return given
        if given.get("type") != "json_schema" or not isinstance(given.get("schema"), dict):
            raise ValueError(
                f"text.format={given!r:.80} is not allowed: the type text, json_object, or "
                "json_schema with a schema"
            )
        schema = {name: given[name] for name in ("name", "schema", "strict") if name in given}
        return {"type": "json_schema", "json_schema": schema}

    def _tool_choice(self) -> Any:
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") != "function" or not isinstance(choice.get("name"), str):
            raise ValueError(
                f"tool_choice={choice!r:.80} is not allowed: none, auto, required, or "
                "{type: function, name: …}"
            )
        return {"type": "function", "function": {"name": choice["name"]}}


def _tool(tool: Any, at: str) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        kind = tool.get("type") if isinstance(tool, dict) else tool
        raise ValueError(f"{at}.type={kind!r:.80} is not supported: only function")
    if not isinstance(tool.get("name"), str):
        raise ValueError(f"{at}.name={tool.get('name')!r:.80} is not allowed: a string")
    names = ("name", "description", "parameters", "strict")
    return {"type": "function", "function": {n: tool[n] for n in names if tool.get(n) is not None}}


def _text(content: Any, at: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{at}={content!r:.80} is not allowed: a string or a list of text parts")
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if isinstance(part, dict) and kind in (*TEXT_PARTS, "refusal"):
            text = part.get("refusal" if kind == "refusal" else "text")
        else:
            text = None
        if not isinstance(text, str):
            raise ValueError(f"{at}[{i}].type={kind!r:.80} is not supported: input_text")
        texts.append(text)
    return "".join(texts)


def _messages(given: str | list[Any]) -> list[Message]:
    """Items as chat messages: the calls behind an assistant's text are part of its message."""
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[Message] = []
    for i, item in enumerate(given):
        at = f"input[{i}]"
        if not isinstance(item, dict):
            raise ValueError(f"{at}={item!r:.80} is not allowed: an object")
        kind = item.get("type", "message")
        if kind == "message":
            if item.get("role") not in ROLES:
                raise ValueError(
                    f"{at}.role={item.get('role')!r:.80} is not allowed: one of {', '.join(ROLES)}"
                )
            text = _text(item.get("content"), f"{at}.content")
            messages.append({"role": item["role"], "content": text})
        elif kind == "function_call":
            call = {"id": _string(item, "call_id", at), "type": "function"}
            function = {name: _string(item, name, at) for name in ("name", "arguments")}
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": None})
            messages[-1].setdefault("tool_calls", []).append({**call, "function": function})
        elif kind == "function_call_output":
            result = _text(item.get("output"), f"{at}.output")
            call_id = _string(item, "call_id", at)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": result})
        elif kind != "reasoning":
            raise ValueError(
                f"{at}.type={kind!r:.80} is not supported: message, function_call, "
                "function_call_output"
            )
    if not messages:
        raise ValueError("input is empty: at least one message is needed")
    return messages


def _string(item: dict[str, Any], name: str, at: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{at}.{name}={value!r:.80} is not allowed: a string")
    return value


def turn_starts(messages: list[Message]) -> tuple[int, list[int]]:
    """How many system messages come first, and where the user's turns behind them begin."""
    system = 0
    while system < len(messages) and messages[system]["role"] in ("system", "developer"):
        system += 1
    users = [i for i in range(system + 1, len(messages)) if messages[i]["role"] == "user"]
    return system, users
