"""Contiguous slots: memory comes with the slot, and prefixes are copied into it. No torch."""

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
from nanochat_ray.engine.sequence import Sequence


class PrefixCopies(Protocol):
    """Memory for copies of prefixes, in blocks (``prefix_store.PrefixStore``)."""

    def load(self, block_ids: SequenceOf[int], slot: int) -> None:
        """Copies blocks to the start of a slot."""

    def save(self, slot: int, new_blocks: SequenceOf[tuple[int, int]]) -> None:
        """Copies blocks of a slot, as (index in the slot, block id)."""


class SlotManager(KVCacheManager):
    """For ``SlotCache``."""

    def __init__(
        self,
        num_slots: int,
        max_model_len: int,
        num_prefix_blocks: int = 0,
        copies: PrefixCopies | None = None,
    ):
        """``copies`` has ``num_prefix_blocks`` blocks; None: no prefix cache."""
        self._num_slot_tokens = num_slots * max_model_len
        self._allocator = BlockAllocator([BlockPool(num_prefix_blocks if copies else 0)])
        self._copies = copies

    @property
    def num_lookup_tokens(self) -> int:
        return self._allocator.num_lookup_tokens

    @property
    def num_hit_tokens(self) -> int:
        return self._allocator.num_hit_tokens

    @property
    def caches_prefixes(self) -> bool:
        return self._copies is not None

    def can_admit(self, sequence: Sequence, running: SequenceOf[Sequence]) -> bool:
        return True

    def match_prefix(self, sequence: Sequence) -> int:
        if self._copies is None:
            return 0
        limit, scope = num_matchable_tokens(sequence), sequence.request.cache_scope
        tables = self._allocator.match_prefix(sequence.tokens, limit, scope)
        (block_ids,) = tables
        if block_ids:
            self._copies.load(block_ids, sequence.slot)
        self._allocator.free(tables)
        return len(block_ids) * BLOCK_SIZE

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        return True

    def commit(self, sequence: Sequence) -> None:
        if self._copies is None:
            return
        limit, scope = num_committable_tokens(sequence), sequence.request.cache_scope
        new_blocks = self._allocator.insert_prefix(sequence.tokens, limit, scope)
        if new_blocks:
            self._copies.save(sequence.slot, new_blocks)

    def free(self, sequence: Sequence) -> None:
        pass

    def reset_prefix_cache(self) -> None:
        self._allocator.reset_prefix_cache()

    def frees_memory(self, sequence: Sequence) -> bool:
        return True

    def usage(self, running: SequenceOf[Sequence]) -> float:
        return sum(s.num_computed_tokens for s in running) / self._num_slot_tokens

    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        self._allocator.check_integrity([])
