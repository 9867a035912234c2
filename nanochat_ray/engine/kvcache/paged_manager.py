"""Paged memory: sequences get blocks as they grow and share those of a common prefix. No torch."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from typing import Protocol

from nanochat_ray.engine.kvcache.base import (
    KVCacheManager,
    num_committable_tokens,
    num_matchable_tokens,
)
from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator, BlockTables
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE
from nanochat_ray.engine.sequence import Sequence


class BlockTableWriter(Protocol):
    """What attention reads block tables from (``paged_cache.PagedCache``)."""

    def set_block_tables(self, slot: int, tables: BlockTables) -> None:
        """The blocks of the sequence in a slot."""


class PagedManager(KVCacheManager):
    """For ``PagedCache``."""

    def __init__(
        self, allocator: BlockAllocator, cache: BlockTableWriter, caches_prefixes: bool = True
    ):
        self.allocator, self.caches_prefixes = allocator, caches_prefixes
        self._cache = cache
        self._tables: dict[Sequence, BlockTables] = {}
        """Of the sequences that have blocks."""

    def block_tables(self, sequence: Sequence) -> BlockTables:
        """The block ids of a sequence, by pool."""
        return self._tables.get(sequence) or self.allocator.empty_tables()

    def can_admit(self, sequence: Sequence, running: SequenceOf[Sequence]) -> bool:
        length = min(sequence.num_tokens + 1, sequence.max_length)
        others = [(self.block_tables(s), s.num_tokens) for s in running]
        return self.allocator.can_admit(length, others)

    def match_prefix(self, sequence: Sequence) -> int:
        if not self.caches_prefixes:
            return 0
        self.free(sequence)
        limit, scope = num_matchable_tokens(sequence), sequence.request.cache_scope
        tables = self.allocator.match_prefix(sequence.tokens, limit, scope)
        if tables[0]:
            self._tables[sequence] = tables
        num_tokens = sequence.num_allocated_tokens = len(tables[0]) * BLOCK_SIZE
        self.num_lookup_tokens += limit
        self.num_hit_tokens += num_tokens
        return num_tokens

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        tables = self.block_tables(sequence)
        before = len(tables[0])
        if num_tokens <= before * BLOCK_SIZE:
            # Blocks behind a window are freed when the next one is allocated.
            return True
        if not self.allocator.extend(tables, sequence.num_computed_tokens, num_tokens):
            return False
        if len(tables[0]) > before:
            self._tables[sequence] = tables
            sequence.num_allocated_tokens = len(tables[0]) * BLOCK_SIZE
            self._cache.set_block_tables(sequence.slot, tables)
        return True

    def commit(self, sequence: Sequence) -> None:
        if self.caches_prefixes:
            limit, scope = num_committable_tokens(sequence), sequence.request.cache_scope
            self.allocator.commit(self.block_tables(sequence), sequence.tokens, limit, scope)

    def free(self, sequence: Sequence) -> None:
        sequence.num_allocated_tokens = 0
        if tables := self._tables.pop(sequence, None):
            self.allocator.free(tables)

    def reset_prefix_cache(self) -> None:
        self.allocator.reset_prefix_cache()

    def frees_memory(self, sequence: Sequence) -> bool:
        return sequence in self._tables

    def usage(self, running: SequenceOf[Sequence]) -> float:
        return self.allocator.usage

    def check_integrity(self, running: SequenceOf[Sequence]) -> None:
        assert self._tables.keys() <= set(running), "a sequence that does not run has blocks"
        self.allocator.check_integrity(list(self._tables.values()))
