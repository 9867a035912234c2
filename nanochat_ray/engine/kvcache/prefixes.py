"""Beginnings of prompts that are known already, by layout: copied into a slot, or held.

Only what was computed as a prompt is kept and found. Keys of decoded tokens differ in the last
bit, and answers must not depend on who was before. Scopes (``Request.cache_scope``) share nothing.
"""

from __future__ import annotations

from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE, BlockPool
from nanochat_ray.engine.kvcache.prefix_store import PrefixStore
from nanochat_ray.engine.kvcache.slot_cache import SlotCache
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
        self.blocks = BlockAllocator([BlockPool(tokens // BLOCK_SIZE)])
        self._store = PrefixStore(cache, tokens // BLOCK_SIZE)

    def begin(self, sequence: Sequence) -> None:
        """Gives a sequence that starts what is known of its prompt."""
        tables = self.blocks.match_prefix(
            sequence.tokens, _reach(sequence), sequence.request.cache_scope
        )
        sequence.cached = sequence.computed = len(tables[0]) * BLOCK_SIZE
        if tables[0]:
            self._store.load(tables[0], sequence.slot)
        self.blocks.free(tables)

    def keep(self, sequence: Sequence) -> None:
        """Keeps what is computed of its prompt."""
        known = min(sequence.computed, len(sequence.request.prompt))
        new_blocks = self.blocks.insert_prefix(sequence.tokens, known, sequence.request.cache_scope)
        if new_blocks:
            self._store.save(sequence.slot, new_blocks)


class SharedPrefixes:
    """For ``PagedCache``: nothing is copied."""

    def __init__(self, blocks: BlockAllocator):
        self.blocks = blocks

    def begin(self, sequence: Sequence) -> None:
        """Gives a sequence that starts what is known of its prompt."""
        sequence.blocks = self.blocks.match_prefix(
            sequence.tokens, _reach(sequence), sequence.request.cache_scope
        )
        sequence.cached = sequence.computed = len(sequence.blocks[0]) * self.blocks.block_size

    def keep(self, sequence: Sequence) -> None:
        """Keeps what is computed of its prompt."""
        known = min(sequence.computed, len(sequence.request.prompt))
        scope = sequence.request.cache_scope
        self.blocks.commit(sequence.blocks, sequence.tokens, known, scope)
