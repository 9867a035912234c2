"""Tools that the engine runs in the middle of an answer; the one there is does sums.

Between the tool's start and end token the model writes its input. The engine runs it and writes
``out_start, result, out_end`` into the answer, as nanochat does for its calculator.
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
"""Whole numbers stay below 2**512 (154 digits), so every operation is quick."""


@dataclass(frozen=True)
class Tool:
    """Token ids that frame its use; ``run`` takes the input's ids and gives the result's, or None
    if there is no result: then the model writes on by itself. ``run`` must be pure and quick."""

    start: int
    end: int
    out_start: int
    out_end: int
    run: Callable[[list[int]], list[int] | None]


@dataclass
class ToolState:
    """Where one answer stands: a function of its tokens alone, so that it can be replayed."""

    tool: Tool
    _input: list[int] | None = field(default=None)

    def feed(self, token: int) -> list[int]:
        """Takes one token of the model's; returns those that are to be forced after it."""
        tool = self.tool
        if token == tool.start:
            self._input = []
        elif self._input is not None and token == tool.end:
            written, self._input = self._input, None
            result = tool.run(written) if len(written) <= MAX_INPUT_TOKENS else None
            if result is not None:
                return [tool.out_start, *result, tool.out_end]
        elif self._input is not None:
            self._input.append(token)
        return []

    def replay(self, tokens: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """Takes an answer so far, forced tokens included. Returns the tokens still to be forced,
        and where tools wrote: from the model's token that called one to behind the output."""
        due: list[int] = []
        written = []
        for at, token in enumerate(tokens):
            if due and token == due[0]:
                del due[0]
            else:
                due = self.feed(token)
                if due:
                    written.append((at, at + 1 + len(due)))
        return due, written


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
    """The value of a sum such as ``12*(3+4)`` or ``"strawberry".count("r")``; None if it has none.

    Numbers, + - * / // % ** and parentheses. Nothing is ever evaluated as Python: the expression
    is parsed and walked, and its length, depth and numbers are bounded, so that no input takes
    long. Whole results carry no decimal point (10/4 is 2.5, 10/5 is 2).
    """
    expression = expression.strip()
    if len(expression) > MAX_CHARACTERS:
        return None
    if found := _COUNT.fullmatch(expression):
        return str(found[2].count(found[4]))
    expression = _THOUSANDS.sub("", expression)
    if not _ARITHMETIC.fullmatch(expression):
        return None
    try:
        return _written(_value(ast.parse(expression, mode="eval").body, 0))
    except (
        _NotAllowedError,
        SyntaxError,
        ArithmeticError,
        ValueError,
        RecursionError,
        MemoryError,
    ):
        return None


def _written(value: Number) -> str:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 1e15 else f"{value:.10g}"
    return str(value)


def _value(node: ast.AST, depth: int) -> Number:
    if depth > MAX_DEPTH:
        raise _NotAllowedError
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.UAdd)):
        value = _value(node.operand, depth + 1)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
        if isinstance(node.op, ast.Pow):
            return _bounded(_power(left, right))
        if operation := _OPERATIONS.get(type(node.op)):
            return _bounded(operation(left, right))
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
    if (
        whole
        and abs(base) > 1
        and (exponent > MAX_BITS or math.log2(abs(base)) * exponent > MAX_BITS)
    ):
        raise _NotAllowedError
    result = base**exponent
    if isinstance(result, complex):
        raise _NotAllowedError
    return result


def _bounded(value: Number) -> Number:
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise _NotAllowedError
    elif not math.isfinite(value):
        raise _NotAllowedError
    return value
