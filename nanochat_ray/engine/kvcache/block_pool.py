"""Blocks of keys and values: reference counts, content hashes and eviction. No torch.

A full block is identified by a hash chain: the digest of its tokens and of the hash of the block
before it (for the first block: of the cache scope). A block is therefore found only behind an
identical prefix, and only within its scope.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

BLOCK_SIZE = 16
"""Tokens of a block."""
NULL_BLOCK = -1
"""Entry of a block table whose block was freed because it is behind the attention window."""


def hash_blocks(tokens: Sequence[int], limit: int, scope: str = "") -> list[bytes]:
    """Hashes of the full blocks of ``tokens[:limit]``. Different scopes share no hash."""
    ids = array("q", tokens[: limit // BLOCK_SIZE * BLOCK_SIZE])
    data, step = ids.tobytes(), BLOCK_SIZE * ids.itemsize
    hashes: list[bytes] = []
    digest = hashlib.sha256(scope.encode("utf-8", "surrogatepass")).digest() if scope else b""
    for start in range(0, len(data), step):
        # Not Python's hash: a client must not be able to construct two prompts that collide.
        digest = hashlib.sha256(digest + data[start : start + step]).digest()
        hashes.append(digest)
    return hashes


@dataclass
class BlockPool:
    """``capacity`` blocks for the layers that attend to ``window`` earlier tokens (-1: to all).

    Invariants: a block is free (without content), evictable (no references, but its content can be
    found by hash), referenced, or has no memory (``shrink``); a hash identifies at most one block.
    """

    capacity: int
    """Blocks that have memory."""
    window: int = -1
    _free: list[int] = field(init=False)
    _evictable: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Least recently used first."""
    _without_memory: list[int] = field(default_factory=list)
    _ref_counts: list[int] = field(init=False)
    _hash_to_block: dict[bytes, int] = field(default_factory=dict)
    _block_to_hash: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free = list(range(self.capacity))[::-1]
        self._ref_counts = [0] * self.capacity

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be allocated, evictable ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_unused_blocks(self) -> int:
        """Blocks that can be allocated without evicting a cached one."""
        return len(self._free)

    def contains(self, block_hash: bytes) -> bool:
        return block_hash in self._hash_to_block

    def allocate(self) -> int:
        """A block to write to, with one reference. ``num_free_blocks`` must be positive."""
        block_id = self._take_free()
        self._ref_counts[block_id] = 1
        return block_id

    def _take_free(self) -> int:
        """A free block; without one, the block that was not used for the longest time."""
        if self._free:
            return self._free.pop()
        block_id, _ = self._evictable.popitem(last=False)
        del self._hash_to_block[self._block_to_hash.pop(block_id)]
        return block_id

    def grow(self, count: int) -> None:
        """``count`` more blocks; the ids are the lowest that have no memory."""
        first = len(self._ref_counts)
        num_new = max(0, count - len(self._without_memory))
        self._without_memory = sorted({*self._without_memory, *range(first, first + num_new)})
        self._ref_counts += [0] * num_new
        self._free += self._without_memory[:count][::-1]
        del self._without_memory[:count]
        self.capacity += count

    def shrink(self, count: int) -> list[int]:
        """Takes up to ``count`` blocks that nobody references out of use, and returns their ids."""
        block_ids = [self._take_free() for _ in range(min(count, self.num_free_blocks))]
        self._without_memory += block_ids
        self.capacity -= len(block_ids)
        return block_ids

    def touch(self, block_hash: bytes) -> int:
        """The block with this hash, with one more reference."""
        block_id = self._hash_to_block[block_hash]
        self._evictable.pop(block_id, None)
        self._ref_counts[block_id] += 1
        return block_id

    def set_hash(self, block_id: int, block_hash: bytes) -> None:
        """From now on the block is found by this hash, unless another block has it already."""
        if block_id not in self._block_to_hash and block_hash not in self._hash_to_block:
            self._hash_to_block[block_hash], self._block_to_hash[block_id] = block_id, block_hash

    def clear_hashes(self) -> None:
        """No block can be found any more; those that are evictable become free."""
        self._free += self._evictable
        self._evictable.clear()
        self._hash_to_block.clear()
        self._block_to_hash.clear()

    def free(self, block_ids: Sequence[int]) -> None:
        """One reference less for each block of a sequence's block table."""
        # The last block becomes evictable first, so that it is evicted before its prefix, without
        # which it cannot be found.
        for block_id in reversed(block_ids):
            if block_id == NULL_BLOCK:
                continue
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                if block_id in self._block_to_hash:
                    self._evictable[block_id] = None
                else:
                    self._free.append(block_id)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """AssertionError if a block is lost, referenced by others than ``tables``, or has a wrong
        hash."""
        counts = Counter(i for block_ids in tables for i in block_ids if i != NULL_BLOCK)
        block_ids = list(range(len(self._ref_counts)))
        assert [counts[block_id] for block_id in block_ids] == self._ref_counts
        without_content = [*self._free, *self._without_memory]
        assert sorted([*without_content, *self._evictable, *counts]) == block_ids
        assert self.capacity == len(block_ids) - len(self._without_memory)
        assert self._hash_to_block == {h: block_id for block_id, h in self._block_to_hash.items()}
        assert self._block_to_hash.keys() >= self._evictable.keys()
