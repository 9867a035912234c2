"""Rejects names that are bare participles and terms that this project has replaced.

    python cluster/names.py FILE...

Only names that a file binds are looked at: variables, arguments, attributes, functions, classes,
aliases. Prints each with its place; status 1 if there is one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

IRREGULAR = frozenset(
    """begun bought brought built chosen come done drawn driven fallen felt flown forgotten found
    given gone got grown heard held hidden kept known laid led left lent lost made meant met paid
    said seen sent shown sold sought spent spoken stood taken taught told thrown thought understood
    won worn written""".split()  # noqa: SIM905 - a list of words reads better as text
)
NOT_PARTICIPLES = frozenset(
    """seed speed feed need embed bed red shed weed bleed breed deed reed
    ReluSquared""".split()  # noqa: SIM905
)
"""Nouns and verbs that end in "ed", and terms of the field."""
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
    if word in NOT_PARTICIPLES or "_" in word:
        return ""
    participle = word in IRREGULAR or (word.endswith("ed") and word.isalpha())
    return "a bare participle: name the thing" if participle else ""


def main(files: list[str]) -> int:
    names = rejected = 0
    for file in files:
        for name, line in bound_names(ast.parse(Path(file).read_text(), file)):
            names += 1
            if why := reason(name):
                rejected += 1
                print(f"{file}:{line}: {name!r}: {why}")
    share = rejected / max(1, names)
    print(f"{names:,} bound names, {rejected} rejected ({share:.2%})", file=sys.stderr)
    return 1 if rejected else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
