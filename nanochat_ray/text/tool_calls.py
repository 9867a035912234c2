"""Function calls as text: how a client wants them, and calls that the model has written.

A call is ``{"name":…,"arguments":{…}}`` between the delimiters of ``text.chat``. A forced call
(``tool_choice`` "required" or a name) follows a grammar over the parameters of the functions, so
its arguments always fit, whatever the model has learnt. An answer holds one call at most. The
calculator, if a client declares it and no other function, is called with an expression.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from nanochat_ray.text.chat import CALCULATOR, EXPRESSION, call_prefix

CALL_END = "}"


@dataclass(frozen=True)
class CallDelta:
    """A further part of a call; ``name`` comes with the first."""

    arguments: str
    name: str | None = None


@dataclass(frozen=True)
class ToolChoice:
    """How a request wants functions called."""

    mode: Literal["none", "auto", "required", "named"] = "none"
    functions: tuple[str, ...] = ()
    """Names that a call may have."""
    calculator: bool = False
    """Whether an expression is a call for the client, not for the engine's calculator."""
    grammar: dict[str, Any] | None = field(default=None, compare=False)
    """What a forced call follows; None if no call is forced, or if it is an expression."""

    @property
    def is_forced(self) -> bool:
        return self.mode in ("required", "named")

    def parse(self, text: str) -> CallDelta | None:
        """The call that the model wrote between its delimiters; None if it is none of these."""
        if self.mode == "none":
            return None
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


class CallStream:
    """Splits the text of a forced call, as it comes, into name and arguments."""

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
        # The last brace may belong to the call, not to the arguments.
        rest = CALL_END if self._pending.endswith(CALL_END) else ""
        arguments = self._pending[: len(self._pending) - len(rest)]
        self._pending = rest
        return [CallDelta(arguments, name)] if arguments or name is not None else []

    def flush(self, complete: bool) -> list[CallDelta]:
        """The rest of a call; ``complete`` is False if the answer was cut."""
        if complete or self._name is None or not self._pending:
            return []
        return [CallDelta(self._pending)]
