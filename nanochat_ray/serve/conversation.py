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

from pydantic import BaseModel, ConfigDict, StrictStr

FUNCTION = "calculator"
ARGUMENT = "expression"
SIGNATURE = f"{FUNCTION}({ARGUMENT}: string)"

Calling = Literal["no", "auto", "required", "named"]
"""How a client wants calls: the last two force one; they end differently in OpenAI's protocol."""


class Body(BaseModel):
    """Base of all that clients send. Unknown fields are ignored, as vLLM does.

    A validator's message begins with its field's name, which ``errors`` reports as ``param``.
    """

    model_config = ConfigDict(extra="ignore", protected_namespaces=())


class ContentPart(Body):
    type: StrictStr
    text: StrictStr | None = None


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

    def text(self, at: str) -> str:
        """The message's text. ValueError names a part that is no text."""
        if self.content is None:
            raise ValueError(f"{at}.content: a string or a list of text parts is needed")
        if isinstance(self.content, str):
            return self.content
        for i, part in enumerate(self.content):
            if part.type != "text" or part.text is None:
                raise ValueError(
                    f"{at}.content[{i}]: type {part.type!r} is not supported, only 'text'"
                )
        return "".join(part.text or "" for part in self.content)


class FunctionSpec(Body):
    name: StrictStr
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
        if not _is_calculator(tool):
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


def _is_calculator(tool: ToolSpec) -> bool:
    if tool.function.name != FUNCTION:
        return False
    schema = tool.function.parameters
    if not schema:
        return True
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, dict) or not isinstance(properties.get(ARGUMENT), dict):
        return False
    of_text = properties[ARGUMENT].get("type", "string") == "string"
    return of_text and (required is None or required in ([], [ARGUMENT]))


def arguments(expression: str) -> str:
    return json.dumps({ARGUMENT: expression}, ensure_ascii=False)


def _expression(call: ToolCall, at: str) -> str:
    name, given = call.function.name, call.function.arguments
    if name != FUNCTION:
        raise ValueError(f"{at}.function.name={name!r} is not known: {SIGNATURE}")
    try:
        found = json.loads(given)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not isinstance(found.get(ARGUMENT), str):
        raise ValueError(
            f"{at}.function.arguments={given!r:.80} is not allowed: a JSON object with a string "
            f"{ARGUMENT!r}"
        )
    return found[ARGUMENT]


def turns(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as ``text.chat`` takes them: an assistant's messages with the tool results between
    them become one turn. ValueError names the message that is wrong."""
    found: list[dict[str, Any]] = []
    due: dict[str, str] = {}  # expressions that were called and have no result yet, by call
    open_turn = False  # the assistant's turn goes on after a result
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if message.role == "function":
            raise ValueError(f"{at}.role='function' is not supported: use tools and 'tool'")
        if message.role == "tool":
            expression = due.pop(message.tool_call_id or "", None)
            if expression is None:
                raise ValueError(
                    f"{at}.tool_call_id={message.tool_call_id!r} is not allowed: the id of a call "
                    "in an assistant's message before it that has no result yet"
                )
            found[-1]["content"] += [
                {"type": "python", "text": expression},
                {"type": "python_output", "text": message.text(at)},
            ]
            open_turn = True
            continue
        if due:
            raise ValueError(
                f"{at}.role={message.role!r}: the result of {next(iter(due))!r} is due"
            )
        if message.role != "assistant":
            role = "system" if message.role == "developer" else message.role
            found.append({"role": role, "content": message.text(at)})
            open_turn = False
            continue
        calls = message.tool_calls or []
        text = "" if message.content is None and calls else message.text(at)
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}] if text or not calls else []
        if open_turn:
            found[-1]["content"] += parts
        else:
            found.append({"role": "assistant", "content": parts})
        for k, call in enumerate(calls):
            where = f"{at}.tool_calls[{k}]"
            if call.id in due:
                raise ValueError(f"{where}.id={call.id!r} comes twice")
            due[call.id] = _expression(call, where)
        open_turn = False
    if due:
        raise ValueError(f"messages: the result of the call {next(iter(due))!r} is missing")
    return found
