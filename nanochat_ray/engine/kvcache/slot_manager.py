"""Contiguous slots: memory grows within the slot, and prefixes are copied into it. No torch."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from nanochat_ray.engine.kvcache.base import (
    KVCacheManager,
    num_committable_tokens,
    num_matchable_tokens,
)
from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE, BlockPool
from nanochat_ray.engine.kvcache.memory_budget import STEP, MemoryBudget
from nanochat_ray.engine.kvcache.slot_pages import SlotPages
from nanochat_ray.engine.sequence import Sequence


class PrefixCopies(Protocol):
    """Memory for copies of prefixes, in blocks (``prefix_store.PrefixStore``)."""

    def load(self, block_ids: SequenceOf[int], slot: int) -> None:
        """Copies blocks to the start of a slot."""

    def save(self, slot: int, new_blocks: SequenceOf[tuple[int, int]]) -> None:
        """Copies blocks of a slot, as (index in the slot, block id)."""

    def release(self, block_id: int) -> None:
        """Gives the memory of a block back to the system."""


class SlotManager(KVCacheManager):
    """For ``SlotCache``. Slots and copies of prefixes share one budget: a sequence that needs
    memory gets first that of slots without a sequence, then that of the prefixes that were not used
    for the longest time."""

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        copies: PrefixCopies | None = None,
        prefix_budget: MemoryBudget | None = None,
        pages: SlotPages | None = None,
        caches_outputs: bool = False,
    ):
        """``copies`` has room for ``prefix_budget.limit`` bytes; None: no prefix cache. ``pages``:
        by default there is memory for all slots and blocks, of 1 byte a token. ``caches_outputs``:
        the output of a request can be a prefix of the next one, since outputs are computed to the
        same bits as prompts."""
        prefix_budget = prefix_budget or MemoryBudget(0)
        if pages is None:
            budget = MemoryBudget(num_slots * max_model_len + prefix_budget.limit)
            pages = SlotPages(num_slots, max_model_len, 1, 1, budget)
        self._pages, self._caches_outputs = pages, caches_outputs
        self._prefixes = BlockPool(0)
        self._allocator = BlockAllocator([self._prefixes])
        self._copies, self._prefix_budget = copies, prefix_budget
        self._block_bytes = BLOCK_SIZE * pages.bytes_per_token
        self.caches_prefixes = copies is not None

    @property
    def budget(self) -> MemoryBudget:
        """Of slots and copies together."""
        return self._pages.budget

    def can_admit(self, sequence: Sequence, running: SequenceOf[Sequence]) -> bool:
        if not running:
            return True
        pages = self._pages
        length = min(sequence.num_tokens + 1, sequence.max_length)
        num_needed = pages.num_bytes(length) + pages.total_bytes(
            (s.slot, s.num_tokens) for s in running
        )
        return pages.budget.can_hold(num_needed)

    def match_prefix(self, sequence: Sequence) -> int:
        if self._copies is None:
            return 0
        limit = num_matchable_tokens(sequence, self._caches_outputs)
        tables = self._allocator.match_prefix(sequence.tokens, limit, sequence.request.cache_scope)
        (block_ids,) = tables
        num_tokens = len(block_ids) * BLOCK_SIZE
        if block_ids and self.allocate(sequence, num_tokens):
            self._copies.load(block_ids, sequence.slot)
        else:
            num_tokens = 0
        self._allocator.free(tables)
        self.num_lookup_tokens += limit
        self.num_hit_tokens += num_tokens
        return num_tokens

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        slot = sequence.slot
        while num_bytes := self._pages.commit(slot, num_tokens):
            if not self._pages.release_idle() and not self._release_prefixes(num_bytes):
                return False
        sequence.num_allocated_tokens = self._pages.num_tokens(slot)
        return True

    def _release_prefixes(self, num_bytes: int) -> bool:
        """Gives back at least so much memory of the prefix cache; False if it has none."""
        block_ids = self._prefixes.shrink(-(-max(num_bytes, STEP) // self._block_bytes))
        for block_id in block_ids:
            assert self._copies is not None
            self._copies.release(block_id)
        for budget in (self._pages.budget, self._prefix_budget):
            budget.give_back(len(block_ids) * self._block_bytes)
        return bool(block_ids)

    def commit(self, sequence: Sequence) -> None:
        self._save(sequence, num_committable_tokens(sequence))

    def _save(self, sequence: Sequence, num_tokens: int) -> None:
        if self._copies is None or num_tokens < BLOCK_SIZE:
            return
        new_blocks = self._allocator.insert_prefix(
            sequence.tokens, num_tokens, sequence.request.cache_scope, self._grow_prefixes
        )
        if new_blocks:
            self._copies.save(sequence.slot, new_blocks)

    def _grow_prefixes(self, count: int) -> None:
        prefixes = self._prefix_budget
        count = min(count, (prefixes.limit - prefixes.num_bytes) // self._block_bytes)
        while count and not self._take_for_prefixes(count * self._block_bytes):
            count //= 2
        self._prefixes.grow(count)

    def _take_for_prefixes(self, num_bytes: int) -> bool:
        prefixes, pages = self._prefix_budget, self._pages
        if not prefixes.can_hold(prefixes.num_bytes + num_bytes):
            return False
        while not pages.budget.take(num_bytes):
            if not pages.release_idle():
                return False
        return prefixes.take(num_bytes)

    def free(self, sequence: Sequence) -> None:
        if self._caches_outputs:
            # Behind the known tokens there may be one that is in flight.
            self._save(sequence, min(sequence.num_computed_tokens, len(sequence.tokens)))
        sequence.num_allocated_tokens = 0
        self._pages.free(sequence.slot)

    def reset_prefix_cache(self) -> None:
        self._allocator.reset_prefix_cache()

    def frees_memory(self, sequence: Sequence) -> bool:
        return self._pages.is_used(sequence.slot)

    def usage(self, running: SequenceOf[Sequence]) -> float:
        return min(1.0, sum(s.num_computed_tokens for s in running) / self._pages.max_tokens)

    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        self._allocator.check_integrity([])
        prefix_bytes = self._prefixes.capacity * self._block_bytes
        assert self._prefix_budget.num_bytes == prefix_bytes
        self._pages.check_integrity({s.slot for s in running}, prefix_bytes)
