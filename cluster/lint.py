"""Checks that ruff lacks: names that are bare participles or replaced terms, long functions.

    python cluster/lint.py FILE...

Names are those that a file binds: variables, arguments, attributes, functions, classes, aliases.
Prints each finding with its file and line; status 1 if there is one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_LINES = 60
LIMITED = tuple(f"nanochat_ray/{package}/" for package in ("engine", "serve", "train"))
"""Folders whose functions have at most MAX_LINES."""
IRREGULAR = frozenset(
    """begun bought brought built chosen come done drawn driven fallen felt flown forgotten found
    given gone got grown heard held hidden kept known laid led left lent lost made meant met paid
    said seen sent shown sold sought spent spoken stood taken taught told thrown thought understood
    won worn written""".split()  # noqa: SIM905 - a list of words reads better as text
)
NOT_PARTICIPLES = frozenset(
    """seed speed feed need exceed embed bed red shed weed bleed breed deed reed
    hidden created relusquared""".split()  # noqa: SIM905
)
"""Nouns and verbs that end in "ed", terms of the field, and a field of OpenAI's objects."""
REPLACED = {
    "snapshot": "checkpoint",
    "max_slots": "max_num_seqs",
    "token_budget": "max_num_batched_tokens",
    "batch_rows": "global_batch_size",
    "micro_rows": "micro_batch_size",
    "guess": "draft token",
    "guesses": "draft tokens",
    "flying": "in-flight step",
    "VOID": "NULL_BLOCK",
    "place": "block_id, slot, position or address",
    "places": "block_ids, slots, positions or addresses",
    "beginning": "prefix",
    "beginnings": "prefixes",
    "stretch": "span",
    "holdout": "validation split",
    "TextStream": "IncrementalDetokenizer",
}
"""Replaced name → the field's term."""


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of everything that the module binds."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno
            case ast.arg(arg=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno
            case ast.ClassDef(name=name) | ast.ExceptHandler(name=str(name)):
                yield name, node.lineno
            case ast.alias(asname=str(name)):
                yield name, node.lineno
            case ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
                yield name, node.lineno


def reason(name: str) -> str:
    """Why the name is rejected; "" if it is not."""
    word = name.strip("_")
    if word in REPLACED:
        return f"the term is {REPLACED[word]}"
    if word.lower() in NOT_PARTICIPLES or "_" in word:
        return ""
    participle = word in IRREGULAR or (word.endswith("ed") and word.isalpha())
    return "a bare participle: name the thing" if participle else ""


def long_functions(tree: ast.AST) -> Iterator[tuple[str, int, int]]:
    """(name, line, lines) of functions with more than MAX_LINES."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > MAX_LINES:
                yield node.name, node.lineno, lines


def main(files: list[str]) -> int:
    num_names, num_rejections, num_long = 0, 0, 0
    for file in files:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"), file)
        for name, line in bound_names(tree):
            num_names += 1
            if why := reason(name):
                num_rejections += 1
                print(f"{file}:{line}: {name!r}: {why}")
        if file.startswith(LIMITED):
            for name, line, lines in long_functions(tree):
                num_long += 1
                print(f"{file}:{line}: {name} has {lines} lines, {MAX_LINES} are allowed")
    share = num_rejections / max(1, num_names)
    print(f"{num_names:,} bound names, {num_rejections} rejected ({share:.2%})", file=sys.stderr)
    return 1 if num_rejections or num_long else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
