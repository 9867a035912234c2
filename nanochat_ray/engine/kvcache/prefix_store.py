"""Copies of prompt prefixes, for contiguous slots."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE
from nanochat_ray.engine.kvcache.slot_cache import SlotCache
from nanochat_ray.machine import send, zeros


class PrefixStore:
    """Keys and values of cached prefixes, in blocks that a ``BlockAllocator`` numbers.

    They are copied, not shared: copying 512 tokens takes a hundredth of the time to compute them,
    and decoding stays on contiguous memory.
    """

    def __init__(self, cache: SlotCache, num_blocks: int):
        layers, _, heads, _, size = cache.keys.shape
        shape = (layers, heads, num_blocks, BLOCK_SIZE, size)
        self._pairs = [
            (slots, zeros(shape, slots.dtype, slots.device)) for slots in (cache.keys, cache.values)
        ]

    def load(self, block_ids: Sequence[int], slot: int) -> None:
        """Copies blocks to the start of a slot."""
        index = send(torch.tensor(block_ids), self._pairs[0][0].device)
        for slots, blocks in self._pairs:
            target = slots[:, slot, :, : len(block_ids) * BLOCK_SIZE]
            # Straight to the target: ``blocks[:, :, index]`` would be one more copy.
            torch.index_select(
                blocks, 2, index, out=target.unflatten(2, (len(block_ids), BLOCK_SIZE))
            )

    def save(self, slot: int, new_blocks: Sequence[tuple[int, int]]) -> None:
        """Copies consecutive blocks of a slot, as (index in the slot, block id)."""
        first, count = new_blocks[0][0], len(new_blocks)
        index = send(torch.tensor([i for _, i in new_blocks]), self._pairs[0][0].device)
        for slots, blocks in self._pairs:
            source = slots[:, slot, :, first * BLOCK_SIZE : (first + count) * BLOCK_SIZE]
            blocks.index_copy_(2, index, source.unflatten(2, (count, BLOCK_SIZE)))
