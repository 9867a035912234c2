"""The ``tools`` and ``tool_choice`` of a request, and the ``ToolChoice`` that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StrictStr

from nanochat_ray.serve.body import Body, doc
from nanochat_ray.text.chat import call_prefix, is_calculator
from nanochat_ray.text.tool_calls import CALL_END, ToolChoice

_COMBINED = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}


class FunctionSpec(Body):
    name: StrictStr = Field(description="Name of the function.")
    description: StrictStr | None = doc("What the function does, for the model.")
    parameters: dict[str, Any] | None = doc("JSON schema of the arguments, an object.")


class ToolSpec(Body):
    type: Literal["function"] = Field(description="Kind of tool.")
    function: FunctionSpec = Field(description="The function.")


class NamedFunction(Body):
    name: StrictStr = Field(description="Name of the function to call.")


class NamedTool(Body):
    type: Literal["function"] = Field(description="Kind of tool.")
    function: NamedFunction = Field(description="The function.")


class AllowedTools(Body):
    mode: Literal["auto", "required"] = Field(description="Whether one of them must be called.")
    tools: Annotated[list[NamedTool], Field(min_length=1)] = Field(description="Which of tools.")


class AllowedToolsChoice(Body):
    type: Literal["allowed_tools"] = Field(description="Some of the tools.")
    allowed_tools: AllowedTools = Field(description="The tools that may be called.")


AnyToolChoice = Literal["none", "auto", "required"] | NamedTool | AllowedToolsChoice | None


def resolve_tool_choice(tools: Sequence[ToolSpec] | None, choice: AnyToolChoice) -> ToolChoice:
    """ValueError for a choice that is not among the tools, or an empty name."""
    if not tools and choice not in (None, "none", "auto"):
        raise ValueError("tool_choice is only allowed together with tools")
    for i, tool in enumerate(tools or ()):
        if not tool.function.name:
            raise ValueError(f"tools[{i}].function.name='' is not allowed: a name")
    if not tools or choice == "none":
        return ToolChoice()
    functions = {tool.function.name: tool.function for tool in tools}
    if isinstance(choice, AllowedToolsChoice):
        functions = _choose(functions, [tool.function.name for tool in choice.allowed_tools.tools])
        choice = choice.allowed_tools.mode
    if choice is None or choice == "auto":
        has_calculator = any(map(_is_calculator, functions.values()))
        return ToolChoice("auto", tuple(functions), has_calculator)
    mode: Literal["required", "named"] = "required"
    if choice != "required":
        mode, functions = "named", _choose(functions, [choice.function.name])
    if all(map(_is_calculator, functions.values())):
        return ToolChoice(mode, (), True)
    grammar = {
        "structures": [
            {"begin": call_prefix(name), "schema": _parameters(function), "end": CALL_END}
            for name, function in functions.items()
        ]
    }
    return ToolChoice(mode, tuple(functions), False, grammar)


def _choose(functions: dict[str, FunctionSpec], names: list[str]) -> dict[str, FunctionSpec]:
    for name in names:
        if name not in functions:
            raise ValueError(f"tool_choice={name!r:.80} is not allowed: it is not among tools")
    return {name: functions[name] for name in names}


def _is_calculator(function: FunctionSpec) -> bool:
    return is_calculator({"name": function.name, "parameters": function.parameters})


def _parameters(function: FunctionSpec) -> dict[str, Any]:
    """The schema of a function's arguments, which are always an object; the engine closes it."""
    schema = function.parameters or {}
    return schema if schema.keys() & _COMBINED else {"type": "object", "properties": {}, **schema}
