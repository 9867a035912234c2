"""Parses flags; what is wrong with them is one line that names the flag and what is allowed."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import tyro
from tyro import _errors as parse_errors  # its documented hook; pyproject names the exact version

from nanochat_ray.cli import flags
from nanochat_ray.config import new_name

A = TypeVar("A")

OPTION_LISTS = ("--options", "--engine")
"""Former flags that took ``name=value`` for fields of configurations."""
_NUMBERS = {
    r"invalid literal for int\(\) with base 10: (?P<value>.*)": "a whole number",
    r"could not convert string to float: (?P<value>.*)": "a number",
}


def parse(
    args: type[A],
    description: str | None,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
) -> A:
    """The flags as ``args``. Raises ValueError that names the flag, the value and what is allowed.

    ``--help`` prints the everyday flags, ``--help-all`` every flag; both raise SystemExit(0).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not {"-h", "--help"}.isdisjoint(words):
        print(flags.short_help(args, prog or Path(sys.argv[0]).name, description or ""))
        raise SystemExit(0)
    words = ["--help" if word == "--help-all" else word for word in words]

    def refuse(event: parse_errors.ParseErrorEvent) -> None:
        if message := _flag_message(event, args):
            raise _FlagError(message)

    try:
        with parse_errors.on_parse_error(refuse):
            return tyro.cli(args, prog=prog, description=description, args=words)
    except _FlagError as error:
        raise ValueError(str(error)) from None


class _FlagError(Exception):
    """Not a ValueError, which tyro would catch itself."""


def _flag_message(event: parse_errors.ParseErrorEvent, args: type) -> str:
    """What is wrong with a flag; "" for an event that this does not know."""
    if isinstance(event, parse_errors.InvalidChoice):
        name = event.argument.display_name()
        return f"{name}={event.value!r} is not allowed: one of {', '.join(event.choices)}"
    if isinstance(event, parse_errors.BadValue):
        name = event.argument.display_name()
        return f"{name} needs a value"
    if isinstance(event, parse_errors.UnrecognizedArgs):
        return _unknown_argument(event.tokens, [flag.name for flag in flags.all_flags(args)])
    if isinstance(event, parse_errors.InstantiationFailure):
        text = "".join(str(part) for part in event.message)
        if event.argument is None:
            return text
        name = event.argument.display_name()
        for pattern, expectation in _NUMBERS.items():
            if match := re.search(pattern, text, re.DOTALL):
                return f"{name}={match['value']} is not allowed: {expectation}"
        return f"{name} is not allowed: {text}"
    return ""


def _unknown_argument(tokens: Sequence[str], names: Sequence[str]) -> str:
    """Names the flag that has taken the place of a former one, if there is one in ``names``."""
    flag, _, value = tokens[0].partition("=")
    field = flag
    if flag in OPTION_LISTS:
        field, _, value = next((t for t in tokens[1:] if "=" in t), "").partition("=")
    key = (new_name(field) or field).strip("-").replace("_", "-")
    for name in names:
        prefix, _, last = name.removeprefix("--").rpartition(".")
        if last == key and name != flag:
            return f"unknown argument {flag!r}: it is now {_usage(prefix, last, value)}"
    if new := new_name(flag):
        return f"unknown argument {flag!r}: it is now --{new.replace('_', '-')}"
    # ``--model.softcpa``, and a flag under the configuration that it is not of: ``--train.steps``.
    last_part = f"--{key.rpartition('.')[2]}"
    near = [last_part] if last_part in names else difflib.get_close_matches(flag, names, 1, 0.8)
    hint = f"{near[0]}, perhaps? " if near and flag.startswith("--") else ""
    return f"unknown argument {' '.join(tokens)!r}: {hint}see --help"


def _usage(prefix: str, name: str, value: str) -> str:
    """``--model.softcap 20``, ``--model.skips``, ``--model.no-skips``."""
    start = f"--{prefix}." if prefix else "--"
    if value.lower() in ("true", "false"):
        return f"{start}{'no-' if value.lower() == 'false' else ''}{name}"
    return f"{start}{name} {value}".rstrip()
