"""The ``tools`` and ``tool_choice`` of a request as a ``ToolChoice``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from nanochat_ray.serve.conversation import FunctionSpec, ToolChoiceField, ToolSpec
from nanochat_ray.text.chat import call_prefix, is_calculator
from nanochat_ray.text.tool_calls import CALL_END, ToolChoice

_COMBINED = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties"}


def resolve_tool_choice(tools: Sequence[ToolSpec] | None, choice: ToolChoiceField) -> ToolChoice:
    """ValueError for a choice that is not among the tools, or an empty name."""
    if not tools and choice not in (None, "none", "auto"):
        raise ValueError("tool_choice is only allowed together with tools")
    for i, tool in enumerate(tools or ()):
        if not tool.function.name:
            raise ValueError(f"tools[{i}].function.name='' is not allowed: a name")
    if not tools or choice == "none":
        return ToolChoice()
    functions = {tool.function.name: tool.function for tool in tools}
    calculator = any(is_calculator(f.model_dump()) for f in functions.values())
    if choice is None or choice == "auto":
        return ToolChoice("auto", tuple(functions), calculator)
    if choice == "required":
        kind: Literal["required", "named"] = "required"
    else:
        kind, name = "named", choice.function.name
        if name not in functions:
            raise ValueError(f"tool_choice={name!r:.80} is not allowed: it is not among tools")
        functions = {name: functions[name]}
    if all(is_calculator(f.model_dump()) for f in functions.values()):
        return ToolChoice(kind, (), True)
    grammar = {
        "structures": [
            {"begin": call_prefix(name), "schema": _parameters(function), "end": CALL_END}
            for name, function in functions.items()
        ]
    }
    return ToolChoice(kind, tuple(functions), False, grammar)


def _parameters(function: FunctionSpec) -> dict[str, Any]:
    """The schema of a function's arguments, which are always an object."""
    schema = function.parameters or {}
    if schema.keys() & _COMBINED:
        return schema
    closed = {} if schema.keys() & _OPEN else {"additionalProperties": False}
    return {"type": "object", "properties": {}, **closed, **schema}
