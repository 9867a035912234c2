"""Messages and tools as clients send them, in OpenAI's form; ``text.chat`` renders them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, StrictStr
from pydantic_core import CoreSchema

from nanochat_ray.text.chat import content_text, from_openai


def _stop_at_first_error(schema: Any) -> None:
    """Every list and dictionary in a pydantic schema ends at its first wrong item.

    By default there is an error for each: 450,000 wrong numbers cost 12 s and 1.9 GiB.
    """
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict", "set", "frozenset", "tuple"):
            schema["fail_fast"] = True
        for inner in schema.values():
            _stop_at_first_error(inner)
    elif isinstance(schema, (list, tuple)):
        for inner in schema:
            _stop_at_first_error(inner)


class Body(BaseModel):
    """Base of all that clients send. Unknown fields are ignored, as vLLM does.

    A validator's message begins with its field's name, which ``errors`` reports as ``param``.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        schema = handler(source)
        _stop_at_first_error(schema)
        return schema


class ContentPart(Body):
    type: StrictStr
    text: StrictStr | None = None
    refusal: StrictStr | None = None


class CallOfFunction(Body):
    name: StrictStr
    arguments: StrictStr


class ToolCall(Body):
    id: StrictStr
    type: Literal["function"] = "function"
    function: CallOfFunction


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: StrictStr | list[ContentPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: StrictStr | None = None


class FunctionSpec(Body):
    name: StrictStr
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None


class ToolSpec(Body):
    type: Literal["function"]
    function: FunctionSpec


class NamedFunction(Body):
    name: StrictStr


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


ToolChoiceField = Literal["none", "auto", "required"] | NamedTool | None


def turns(messages: Sequence[ChatMessage], tools: Sequence[ToolSpec] = ()) -> list[dict[str, Any]]:
    """Messages as ``text.chat`` renders them. ValueError names the message that is wrong."""
    for i, message in enumerate(messages):
        if message.role == "function":
            raise ValueError(
                f"messages[{i}].role='function' is not supported: use tools and 'tool'"
            )
    return from_openai(
        [m.model_dump(exclude_none=True) for m in messages],
        [t.model_dump(exclude_none=True) for t in tools],
    )


def message_text(message: ChatMessage) -> str:
    return content_text(message.model_dump(exclude_none=True).get("content"), "content")
