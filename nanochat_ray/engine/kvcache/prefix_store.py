"""Copies of prefixes, for contiguous slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE
from nanochat_ray.engine.kvcache.lazy_memory import LazyMemory
from nanochat_ray.engine.kvcache.slot_cache import SlotCache

COMMIT_BYTES = 32 << 20
"""How much memory is committed at once, ahead of its first use, at most."""


class PrefixStore:
    """Keys and values of cached prefixes, in blocks that a ``BlockAllocator`` numbers.

    They are copied, not shared: copying 512 tokens takes a hundredth of the time to compute them,
    and decoding stays on contiguous memory. A block is contiguous, so that its memory can be given
    back.
    """

    def __init__(self, cache: SlotCache, num_blocks: int):
        self._cache = cache
        _, layers, _, heads, _, size = cache.keys_values.shape
        shape = (num_blocks, 2, layers, heads, BLOCK_SIZE, size)
        dtype, device = cache.keys.dtype, cache.keys.device
        self._memory = LazyMemory(shape, dtype, huge_pages=True) if device.type == "cpu" else None
        self._blocks = (
            self._memory.tensor if self._memory else torch.zeros(shape, dtype=dtype, device=device)
        )
        """``[blocks, 2, layers, Hkv, BLOCK_SIZE, D]``: keys, then values."""
        self._num_committed = 0
        """Blocks from the first one on that have been committed ahead of their use."""

    def load(self, block_ids: Sequence[int], slot: int) -> None:
        """Copies blocks to the start of a slot."""
        for first, block_id, count in _runs(list(enumerate(block_ids))):
            self._in_slot(slot, first, count).copy_(self._in_blocks(block_id, count))

    def save(self, slot: int, new_blocks: Sequence[tuple[int, int]]) -> None:
        """Copies blocks of a slot, as (index in the slot, block id)."""
        for first, block_id, count in _runs(new_blocks):
            self._in_blocks(block_id, count).copy_(self._in_slot(slot, first, count))
            self._commit_ahead(block_id + count)

    def _commit_ahead(self, num_blocks: int) -> None:
        """Blocks are first used in the order of their ids. Behind these, as many again have memory,
        or will soon, up to COMMIT_BYTES."""
        block_bytes = self._blocks[0].nbytes
        count = min(num_blocks, -(-COMMIT_BYTES // block_bytes))
        if self._memory is not None and num_blocks + count > self._num_committed:
            first = max(num_blocks, self._num_committed)
            self._num_committed = first + count
            self._memory.commit(first * block_bytes, count * block_bytes)

    def release(self, block_id: int) -> None:
        """Gives the memory of a block back to the system."""
        if self._memory is not None:
            num_bytes = self._blocks[0].nbytes
            self._memory.release(block_id * num_bytes, num_bytes)

    def _in_slot(self, slot: int, first: int, count: int) -> torch.Tensor:
        """``[2, layers, Hkv, count, BLOCK_SIZE, D]``, the same as ``_in_blocks``."""
        tokens = slice(first * BLOCK_SIZE, (first + count) * BLOCK_SIZE)
        return self._cache.keys_values[:, :, slot, :, tokens].unflatten(3, (count, BLOCK_SIZE))

    def _in_blocks(self, block_id: int, count: int) -> torch.Tensor:
        return self._blocks[block_id : block_id + count].permute(1, 2, 3, 0, 4, 5)


def _runs(blocks: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(index, block id, count) of runs of blocks in which both numbers count up."""
    start = 0
    for i in range(1, len(blocks) + 1):
        is_next = i < len(blocks) and (
            blocks[i][0] - blocks[i - 1][0] == blocks[i][1] - blocks[i - 1][1] == 1
        )
        if not is_next:
            yield *blocks[start], i - start
            start = i
