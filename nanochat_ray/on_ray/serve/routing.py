"""Which replica gets a request: the one that has its prefix cached, unless that one is busy.

Engines cache prompts in blocks of tokens (``engine.kvcache.block_pool``); an ingress remembers
which blocks it sent where, as hashes of everything up to their end. Policy only: no Ray, no clock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE

MAX_BLOCKS = 4096
"""Blocks that are remembered for each replica. One that the replica has evicted meanwhile costs a
worse choice, no more."""
MAX_LEAD = 4
"""Requests by which a replica may be busier than the least busy one and still be chosen for its
cache. A hit saves a prefill; waiting behind four others costs more."""


def hash_blocks(tokens: Sequence[int], scope: str = "") -> list[int]:
    """A hash for each complete block, of all tokens up to its end and of the cache scope."""
    hashes: list[int] = []
    block_hash = hash(scope)
    for start in range(0, len(tokens) - BLOCK_SIZE + 1, BLOCK_SIZE):
        block_hash = hash((block_hash, *tokens[start : start + BLOCK_SIZE]))
        hashes.append(block_hash)
    return hashes


class PrefixRouter:
    """Remembers which prompts each replica has computed."""

    def __init__(self) -> None:
        self._blocks: dict[str, OrderedDict[int, None]] = {}
        """By replica, the least recently used first."""

    def choose(self, tokens: Sequence[int], loads: Mapping[str, int], scope: str = "") -> str:
        """One of ``loads`` (requests by replica, not empty). ``scope``: ``Request.cache_scope``."""
        least = min(loads.values())
        hashes = hash_blocks(tokens, scope)

        def preference(replica: str) -> tuple[int, int]:
            is_near = loads[replica] <= least + MAX_LEAD
            return (-self._num_cached(replica, hashes) if is_near else 1, loads[replica])

        return min(loads, key=preference)

    def _num_cached(self, replica: str, hashes: Sequence[int]) -> int:
        blocks: Mapping[int, None] = self._blocks.get(replica, {})
        return next((i for i, h in enumerate(hashes) if h not in blocks), len(hashes))

    def record(self, replica: str, tokens: Sequence[int], scope: str = "") -> None:
        """``tokens`` are computed there."""
        blocks = self._blocks.setdefault(replica, OrderedDict())
        for block_hash in hash_blocks(tokens, scope):
            blocks[block_hash] = None
            blocks.move_to_end(block_hash)
        while len(blocks) > MAX_BLOCKS:
            blocks.popitem(last=False)

    def forget(self, replica: str) -> None:
        """The replica is gone."""
        self._blocks.pop(replica, None)
