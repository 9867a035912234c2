"""Flags that are the fields of a configuration, and the help that fits one screen.

A command's ``Args`` holds what is the command's own; each configuration that it composes is a field
of type ``overrides(ModelConfig)``: one flag for each field, ``--model.window-pattern SSSL``, and a
dict of those that the user gave, to be laid over what the program derives:

    dataclasses.replace(config, **args.model)
"""

from __future__ import annotations

import dataclasses
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

import tyro
from tyro._docstrings import get_field_docstring  # pyproject names the exact version

EVERYDAY = "everyday"
"""Key of a field's metadata: the names of its configuration's fields that the short help shows."""
WIDTH, TEXT_COLUMN = 100, 32
"""Characters of a line of the short help, and where its descriptions begin."""


def overrides(
    config: type,
    *,
    omit: Sequence[str] = (),
    derived_fields: Sequence[str] = (),
    prefix: bool = True,
) -> Any:
    """The type of a dict with any of ``config``'s fields, which tyro reads as one flag each.

    ``omit`` names fields that are no flags, ``derived_fields`` those whose default the program
    computes. The flags begin with the name of the field of this type, unless ``prefix`` is False.
    """
    hints = get_type_hints(config)
    flags: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.name in omit:
            continue
        default = "derived" if field.name in derived_fields else _default(field)
        text = get_field_docstring(config, field.name, ()) or ""
        # The double backquotes of a docstring are noise in a terminal.
        argument = tyro.conf.arg(help=text.replace("``", ""), help_behavior_hint=default)
        flags[field.name] = Annotated[hints[field.name], argument]
    kind = TypedDict(f"{config.__name__}Flags", flags, total=False)  # type: ignore[misc]
    return kind if prefix else Annotated[kind, tyro.conf.arg(name="")]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "derived"
    factory = field.default_factory
    value = factory() if factory is not MISSING else field.default
    return "" if value in ("", (), None) else f"default: {value}"


@dataclass(frozen=True)
class Flag:
    """One flag: ``--model.window-pattern``, its type, its text, its default as help shows it."""

    name: str
    kind: Any
    text: str
    default: str
    everyday: bool

    @property
    def usage(self) -> str:
        """``--port INT``, ``--gpus``, ``--[no-]ray``."""
        if self.kind is bool:
            return self.name.replace("--", "--[no-]") if "True" in self.default else self.name
        return f"{self.name} {_metavar(self.kind)}"


def _metavar(kind: Any) -> str:
    origin, inner = get_origin(kind), [a for a in get_args(kind) if a is not type(None)]
    if origin is Literal:
        return "|".join(str(value) for value in inner if value != "")  # "" is what no flag means
    if origin in (Union, types.UnionType):
        return _metavar(inner[0])
    if origin in (tuple, list):
        return f"{_metavar(inner[0])}..."
    return "TEXT" if kind is str else kind.__name__.upper()


def all_flags(args: type) -> Iterator[Flag]:
    """Every flag that ``args`` takes, with those of its configurations."""
    hints = get_type_hints(args, include_extras=True)
    for field in dataclasses.fields(args):
        kind = hints[field.name]
        config = get_args(kind)[0] if get_origin(kind) is Annotated else kind
        name = _dashes(field.name)
        if not typing.is_typeddict(config):
            text = get_field_docstring(args, field.name, ()) or ""
            yield Flag(f"--{name}", config, text, _default(field), True)
            continue
        prefix = f"{name}." if config is kind else ""
        everyday = field.metadata.get(EVERYDAY, ())
        for key, hint in get_type_hints(config, include_extras=True).items():
            inner, argument = get_args(hint)
            default = argument.help_behavior_hint
            yield Flag(f"--{prefix}{_dashes(key)}", inner, argument.help, default, key in everyday)


def _dashes(name: str) -> str:
    return name.replace("_", "-")


def short_help(args: type, prog: str, description: str) -> str:
    """The everyday flags, a line each."""
    every = list(all_flags(args))
    everyday_flags = [flag for flag in every if flag.everyday]
    text = description.strip().replace("``", "")
    lines = [f"usage: {prog} [flags]", "", *text.splitlines(), ""]
    lines += [_line(flag) for flag in everyday_flags]
    if more := len(every) - len(everyday_flags):
        groups = {f"{flag.name.partition('.')[0]}.*" for flag in every if "." in flag.name}
        names = ", ".join(sorted(groups))
        lines += ["", f"{more} more flags{f', such as {names}' if names else ''}: --help-all"]
    return "\n".join(lines)


def _line(flag: Flag) -> str:
    default = f" ({flag.default})" if flag.kind is not bool and flag.default != "derived" else ""
    # A 0 that turns something off, or chooses by itself, is explained by the text.
    if default.endswith((" 0)", " 0.0)", "()")) or len(default) > WIDTH // 4:
        default = ""
    start = f"  {flag.usage}".ljust(TEXT_COLUMN - 1) + " "
    text = summary(flag.text, WIDTH - len(start) - len(default))
    return f"{start}{text}{default}".rstrip()


def summary(text: str, room: int) -> str:
    """The first sentence of a docstring, or its first clause, in ``room`` columns."""
    line = " ".join(text.replace("``", "").split())
    sentence = line.partition(". ")[0].removesuffix(".")
    if len(sentence) > room:
        sentence = sentence.partition("; ")[0]
    return textwrap.shorten(sentence, room, placeholder=" …")
