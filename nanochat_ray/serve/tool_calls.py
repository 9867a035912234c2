"""Functions that a client runs itself: how a request wants them called, and calls in answers.

A call that is forced (``tool_choice`` "required" or a name) follows a grammar over the functions'
parameters, so its arguments always fit, whatever the model has learnt. Otherwise the model may
call a function as it calls its calculator, with ``{"name":…,"arguments":{…}}`` instead of an
expression. An answer holds one call at most. The calculator, where a client declares it and
nothing else, is called with an expression in either case.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nanochat_ray.serve.conversation import FunctionSpec, ToolChoice, ToolSpec
from nanochat_ray.text.chat import CALCULATOR, EXPRESSION, call_prefix, is_calculator

CALL_END = "}"
_COMBINED = {"$ref", "anyOf", "oneOf", "allOf", "enum", "const"}
_OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties"}


@dataclass(frozen=True)
class CallDelta:
    """A further part of a call; ``name`` comes with the first."""

    arguments: str
    name: str | None = None


@dataclass(frozen=True)
class ToolCalling:
    """How a request wants functions called."""

    choice: Literal["none", "auto", "required", "named"] = "none"
    functions: tuple[str, ...] = ()
    """Those that a call may name."""
    calculator: bool = False
    """Whether an expression is a call for the client, rather than for the engine's calculator."""
    grammar: dict[str, Any] | None = field(default=None, compare=False)
    """What a forced call follows; None if none is forced, or it is an expression."""

    @property
    def forced(self) -> bool:
        return self.choice in ("required", "named")

    def parse(self, text: str) -> CallDelta | None:
        """The call that the model has written between its delimiters, None if it is not one."""
        for name in self.functions:
            prefix = call_prefix(name)
            if text.startswith(prefix) and text.endswith(CALL_END):
                arguments = text[len(prefix) : -len(CALL_END)]
                if _is_object(arguments):
                    return CallDelta(arguments, name)
        if self.calculator:
            return CallDelta(json.dumps({EXPRESSION: text}, ensure_ascii=False), CALCULATOR)
        return None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def tool_calling(tools: Sequence[ToolSpec] | None, choice: ToolChoice) -> ToolCalling:
    """ValueError for a choice that is not among the tools, or an empty name."""
    if not tools and choice not in (None, "none", "auto"):
        raise ValueError("tool_choice is only allowed together with tools")
    for i, tool in enumerate(tools or ()):
        if not tool.function.name:
            raise ValueError(f"tools[{i}].function.name='' is not allowed: a name")
    if not tools or choice == "none":
        return ToolCalling()
    functions = {tool.function.name: tool.function for tool in tools}
    calculator = any(is_calculator(f.model_dump()) for f in functions.values())
    if choice is None or choice == "auto":
        return ToolCalling("auto", tuple(functions), calculator)
    if choice == "required":
        kind: Literal["required", "named"] = "required"
    else:
        kind, name = "named", choice.function.name
        if name not in functions:
            raise ValueError(f"tool_choice={name!r:.80} is not allowed: it is not among tools")
        functions = {name: functions[name]}
    if all(is_calculator(f.model_dump()) for f in functions.values()):
        return ToolCalling(kind, (), True)
    grammar = {
        "structures": [
            {"begin": call_prefix(name), "schema": _parameters(function), "end": CALL_END}
            for name, function in functions.items()
        ]
    }
    return ToolCalling(kind, tuple(functions), False, grammar)


def _parameters(function: FunctionSpec) -> dict[str, Any]:
    """The schema of a function's arguments, which are always an object."""
    schema = function.parameters or {}
    if schema.keys() & _COMBINED:
        return schema
    closed = {} if schema.keys() & _OPEN else {"additionalProperties": False}
    return {"type": "object", "properties": {}, **closed, **schema}


class CallStream:
    """Cuts the text of a forced call, as it comes, into the parts that a client gets."""

    def __init__(self, functions: Sequence[str]):
        self._prefixes = {name: call_prefix(name) for name in functions}
        self._name: str | None = None
        self._pending = ""

    def push(self, text: str) -> list[CallDelta]:
        self._pending += text
        name = None
        if self._name is None:
            name = next((n for n, p in self._prefixes.items() if self._pending.startswith(p)), None)
            if name is None:
                return []
            self._name = name
            self._pending = self._pending[len(self._prefixes[name]) :]
        # The last brace may be the call's rather than the arguments'.
        rest = CALL_END if self._pending.endswith(CALL_END) else ""
        arguments = self._pending[: len(self._pending) - len(rest)]
        self._pending = rest
        return [CallDelta(arguments, name)] if arguments or name is not None else []

    def end(self, complete: bool) -> list[CallDelta]:
        """What is left of a call that has ended, or was cut."""
        if complete or self._name is None or not self._pending:
            return []
        return [CallDelta(self._pending)]
