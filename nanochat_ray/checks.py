"""Checks of user input. Each returns the value, or raises ValueError in the house form:
``field=value is not allowed: what is``."""

from __future__ import annotations

import math
import re
from typing import Any

MAX_SHOWN = 120
"""Characters of a value that a message repeats."""
MAX_BITS = 200
"""Bits of an int that a message repeats."""
MAX_NAME = 128
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def short_repr(value: object) -> str:
    """``repr`` of a value, shortened in the middle if it is long."""
    # The repr of an int of thousands of digits is an error of its own.
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        return f"an int of {value.bit_length()} bits"
    text = repr(value[: 4 * MAX_SHOWN]) if isinstance(value, str | bytes) else repr(value)
    half = MAX_SHOWN // 2
    return text if len(text) <= MAX_SHOWN else f"{text[:half]}…{text[-half:]}"


def require(ok: bool, field: str, value: object, requirement: str) -> None:
    """ValueError unless ``ok``."""
    if not ok:
        raise ValueError(f"{field}={short_repr(value)} is not allowed: {requirement}")


def check_int(field: str, value: Any, least: int, most: int | None = None) -> int:
    """A whole number from ``least`` to ``most``, both allowed."""
    ok = type(value) is int and least <= value and (most is None or value <= most)
    until = "" if most is None else f" to {most}"
    if most is not None and most.bit_count() == 1 and most > 2**31:
        until = f" to 2**{most.bit_length() - 1}"
    require(ok, field, value, f"a whole number from {least}{until}")
    return value


def check_float(
    field: str, value: Any, least: float = 0.0, most: float | None = None, *, above: bool = False
) -> float:
    """A finite number from ``least`` (with ``above``, more than that) to ``most``."""
    ok = type(value) in (int, float) and math.isfinite(value) and value >= least
    ok = ok and not (above and value == least) and (most is None or value <= most)
    begin = f"a number above {least:g}" if above else f"a number from {least:g}"
    require(ok, field, value, begin if most is None else f"{begin} to {most:g}")
    return value


def check_name(field: str, name: Any) -> str:
    """The name of a run, dataset, tokenizer or checkpoint: one entry of a folder, never a path."""
    ok = isinstance(name, str) and len(name) <= MAX_NAME
    ok = ok and _NAME.fullmatch(name) is not None and not name.endswith(".tmp")
    requirement = (
        f"1 to {MAX_NAME} letters, digits, '.', '_' and '-', not beginning with '.' or '-'"
    )
    require(ok, field, name, requirement)
    return name


def check_port(field: str, value: Any) -> int:
    return check_int(field, value, 1, 65535)
