"""Beginnings of prompts that are known already, by layout: copied into a slot, or held.

Only what was computed as a prompt is kept and found. Keys of decoded tokens differ in the last
bit, and answers must not depend on who was before. Scopes (``Request.cache_scope``) share nothing.
"""

from __future__ import annotations

from nanochat_ray.engine.blocks import BLOCK, BlockPool, Blocks
from nanochat_ray.engine.kv_cache import BlockStore, SlotCache
from nanochat_ray.engine.scheduler import Sequence


def _reach(sequence: Sequence) -> int:
    """How many tokens may be found. The last one is always computed: its logits are wanted."""
    if sequence.unscored:
        return 0
    return min(len(sequence.tokens) - 1, len(sequence.request.prompt))


class CopiedPrefixes:
    """For ``SlotCache``."""

    def __init__(self, cache: SlotCache, tokens: int):
        """``tokens`` is how many are kept, at most."""
        self.blocks = Blocks([BlockPool(tokens // BLOCK)])
        self._store = BlockStore(cache, tokens // BLOCK)

    def begin(self, sequence: Sequence) -> None:
        """Gives a sequence that starts what is known of its prompt."""
        held = self.blocks.match(sequence.tokens, _reach(sequence), sequence.request.cache_scope)
        sequence.cached = sequence.computed = len(held[0]) * BLOCK
        if held[0]:
            self._store.load(held[0], sequence.slot)
        self.blocks.release(held)

    def keep(self, sequence: Sequence) -> None:
        """Keeps what is computed of its prompt."""
        known = min(sequence.computed, len(sequence.request.prompt))
        wanted = self.blocks.keep(sequence.tokens, known, sequence.request.cache_scope)
        if wanted:
            self._store.save(sequence.slot, wanted)


class SharedPrefixes:
    """For ``PagedCache``: nothing is copied."""

    def __init__(self, blocks: Blocks):
        self.blocks = blocks

    def begin(self, sequence: Sequence) -> None:
        """Gives a sequence that starts what is known of its prompt."""
        sequence.blocks = self.blocks.match(
            sequence.tokens, _reach(sequence), sequence.request.cache_scope
        )
        sequence.cached = sequence.computed = len(sequence.blocks[0]) * self.blocks.block

    def keep(self, sequence: Sequence) -> None:
        """Keeps what is computed of its prompt."""
        known = min(sequence.computed, len(sequence.request.prompt))
        scope = sequence.request.cache_scope
        self.blocks.register(sequence.blocks, sequence.tokens, known, scope)
