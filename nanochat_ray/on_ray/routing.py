"""Which engine gets a request: where its prompt's beginning was computed, unless that one is busy.

Engines cache blocks of 16 prompt tokens (``engine.kvcache.block_pool``); an ingress remembers which
blocks it sent where, as hashes of everything up to their end. Policy only: no Ray, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

BLOCK = 16
REMEMBERED = 4096
"""Blocks per engine. One that the engine has dropped meanwhile costs a worse choice, no more."""
MAX_LEAD = 4
"""Requests by which an engine may be busier than the idlest one and still be chosen for what it
has cached. A hit saves a prefill; waiting behind four others costs more."""


def chain(tokens: Sequence[int], scope: str = "") -> list[int]:
    """A hash for each whole block, of all tokens up to its end and of who may share them."""
    found: list[int] = []
    before = hash(scope)
    for at in range(0, len(tokens) - BLOCK + 1, BLOCK):
        before = hash((before, *tokens[at : at + BLOCK]))
        found.append(before)
    return found


class PrefixRouter:
    """Remembers where prompts went (prompts by the names of engines)."""

    def __init__(self) -> None:
        self._sent: dict[str, OrderedDict[int, None]] = {}

    def choose(self, tokens: Sequence[int], loads: Mapping[str, int], scope: str = "") -> str:
        """One of ``loads`` (requests by engine, not empty). ``scope``: ``Request.cache_scope``."""
        least = min(loads.values())
        blocks = chain(tokens, scope)

        def preference(engine: str) -> tuple[int, int]:
            near = loads[engine] <= least + MAX_LEAD
            return (-self._cached(engine, blocks) if near else 1, loads[engine])

        return min(loads, key=preference)

    def _cached(self, engine: str, blocks: Sequence[int]) -> int:
        sent: Mapping[int, None] = self._sent.get(engine, {})
        return next((i for i, block in enumerate(blocks) if block not in sent), len(blocks))

    def sent(self, engine: str, tokens: Sequence[int], scope: str = "") -> None:
        """``tokens`` went there."""
        kept = self._sent.setdefault(engine, OrderedDict())
        for block in chain(tokens, scope):
            kept[block] = None
            kept.move_to_end(block)
        while len(kept) > REMEMBERED:
            kept.popitem(last=False)

    def forget(self, engine: str) -> None:
        """It is gone."""
        self._sent.pop(engine, None)
