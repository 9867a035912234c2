"""Messages and tools in OpenAI's shape: the calculator as a function that clients call themselves.

Without ``tools`` the engine runs the calculator in the middle of an answer. A client that declares
it as a function gets the answer up to the call instead (``finish_reason`` "tool_calls"), and sends
the result back as a message of the role "tool": the same answer then goes on after it. Both are
the same tokens, ``<|python_start|> expression <|python_end|> <|output_start|> result …``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, StrictStr
from pydantic_core import CoreSchema

from nanochat_ray.text.chat import CALCULATOR, EXPRESSION, content_text, from_openai, is_calculator

FUNCTION = CALCULATOR
ARGUMENT = EXPRESSION
SIGNATURE = f"{FUNCTION}({ARGUMENT}: string)"

Calling = Literal["no", "auto", "required", "named"]
"""How a client wants calls: the last two force one; they end differently in OpenAI's protocol."""


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


ToolChoice = Literal["none", "auto", "required"] | NamedTool | None


def calling(tools: Sequence[ToolSpec] | None, choice: ToolChoice) -> Calling:
    """How a request wants calls. ValueError for tools that the model has never seen, or a choice
    that is not among them."""
    if not tools and choice not in (None, "none", "auto"):
        raise ValueError("tool_choice is only allowed together with tools")
    if not tools or choice == "none":
        return "no"
    for i, tool in enumerate(tools):
        if not is_calculator(tool.function.model_dump()):
            raise ValueError(
                f"tools[{i}].function: {tool.function.name!r} with these parameters is not "
                f"supported: the model has learnt one function, {SIGNATURE}"
            )
    if choice is None or choice == "auto":
        return "auto"
    if choice == "required":
        return "required"
    if choice.function.name != FUNCTION:
        raise ValueError(f"tool_choice names {choice.function.name!r}, which is not among tools")
    return "named"


def arguments(expression: str) -> str:
    return json.dumps({ARGUMENT: expression}, ensure_ascii=False)


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
