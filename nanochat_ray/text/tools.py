"""Tools that the engine runs while it generates; the only one is a calculator.

The model generates the input between the tool's start and end token. The engine runs the tool and
injects ``out_start, result, out_end`` into the output, as nanochat does.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nanochat_ray.text.chat import tool_delimiters
from nanochat_ray.text.tokenizer import Tokenizer

MAX_INPUT_TOKENS = 256
MAX_CHARACTERS = 200
MAX_DEPTH = 30
MAX_BITS = 512
"""Integers stay below 2**512 (154 digits), so every operation is fast."""


@dataclass(frozen=True)
class Tool:
    """Delimiter token ids. ``run`` maps the input's token ids to the result's, or to None if there
    is no result; the model then continues by itself. ``run`` must be pure and fast."""

    start: int
    end: int
    out_start: int
    out_end: int
    run: Callable[[list[int]], list[int] | None]


@dataclass
class ToolState:
    """The tool call of one output, a function of its tokens alone, so that it can be replayed."""

    tool: Tool
    _input: list[int] | None = field(default=None)

    def feed(self, token: int) -> list[int]:
        """Processes a sampled token; returns the tokens to inject behind it."""
        tool = self.tool
        if token == tool.start:
            self._input = []
        elif self._input is not None and token == tool.end:
            call_ids, self._input = self._input, None
            result = tool.run(call_ids) if len(call_ids) <= MAX_INPUT_TOKENS else None
            if result is not None:
                return [tool.out_start, *result, tool.out_end]
        elif self._input is not None:
            self._input.append(token)
        return []

    def reacts_to(self, token: int) -> bool:
        """Whether ``feed`` would do anything: the token begins a call, or is in one."""
        return self._input is not None or token == self.tool.start

    def replay(self, tokens: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Processes an output so far, injected tokens included.

        Returns the tokens still to inject, and the span ``[start, end)`` of each tool call: from
        the token that ends the call to the end of the injected tokens.
        """
        pending: list[int] = []
        spans = []
        for i, token in enumerate(tokens):
            if pending and token == pending[0]:
                del pending[0]
            else:
                pending = self.feed(token)
                if pending:
                    spans.append((i, i + 1 + len(pending)))
        return pending, spans


def calculator_tool(tokenizer: Tokenizer) -> Tool:
    """nanochat's calculator behind its four special tokens."""

    def run(ids: list[int]) -> list[int] | None:
        value = calculate(tokenizer.decode(ids))
        return None if value is None else tokenizer.encode(value)

    start, end, out_start, out_end = tool_delimiters(tokenizer)
    return Tool(start, end, out_start, out_end, run)


class _NotAllowedError(Exception):
    pass


_ARITHMETIC = re.compile(r"[0-9eE.+\-*/%() ]+")
_COUNT = re.compile(r"""(["'])([^"'\\]*)\1\.count\((["'])([^"'\\]*)\3\)""")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")

Number = int | float


def calculate(expression: str) -> str | None:
    """The value of ``12*(3+4)`` or ``"strawberry".count("r")``, for example; None if there is none.

    Numbers, + - * / // % ** and parentheses. Nothing is ever evaluated as Python: the expression
    is parsed and walked, and its length, depth and numbers are bounded, so that no input takes
    long. Whole results carry no decimal point (10/4 is 2.5, 10/5 is 2).
    """
    expression = expression.strip()
    if len(expression) > MAX_CHARACTERS:
        return None
    if match := _COUNT.fullmatch(expression):
        return str(match[2].count(match[4]))
    expression = _THOUSANDS.sub("", expression)
    if not _ARITHMETIC.fullmatch(expression):
        return None
    try:
        return _format(_value(ast.parse(expression, mode="eval").body, 0))
    except (
        _NotAllowedError,
        SyntaxError,
        ArithmeticError,
        ValueError,
        RecursionError,
        MemoryError,
    ):
        return None


def _format(value: Number) -> str:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.10g}"
    return str(value)


def _value(node: ast.AST, depth: int) -> Number:
    if depth > MAX_DEPTH:
        raise _NotAllowedError
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return _check_size(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        a, b = _value(node.left, depth + 1), _value(node.right, depth + 1)
        if isinstance(node.op, ast.Pow):
            return _check_size(_power(a, b))
        if operation := _OPERATIONS.get(type(node.op)):
            return _check_size(operation(a, b))
    raise _NotAllowedError


_OPERATIONS: dict[type[ast.operator], Callable[[Number, Number], Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def _power(base: Number, exponent: Number) -> Number:
    # Bounded before it is computed: 9**9**9 would take hours.
    whole = isinstance(base, int) and isinstance(exponent, int) and exponent > 0
    if whole and abs(base) > 1 and math.log2(abs(base)) * exponent > MAX_BITS:
        raise _NotAllowedError
    result = base**exponent
    if isinstance(result, complex):
        raise _NotAllowedError
    return result


def _check_size(value: Number) -> Number:
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise _NotAllowedError
    elif not math.isfinite(value):
        raise _NotAllowedError
    return value
