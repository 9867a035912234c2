"""Which beginnings of prompts are kept, in blocks of 16 tokens. Accounting only, no torch.

A block is known by the chain of blocks before it and its own tokens, so that a block is found only
behind the very same beginning. The keys and values themselves lie in ``kv_cache.BlockStore``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

BLOCK = 16
"""Tokens of a block."""

_Key = tuple[int, tuple[int, ...]]
"""Serial number of the block before (-1: none), and the tokens."""


@dataclass
class _Block:
    place: int
    serial: int


@dataclass
class PrefixBlocks:
    """At most ``capacity`` blocks; the least recently used goes first.

    Invariant: a block is at least as recently used as any behind it, so what is evicted is always
    the end of a chain, and no block is ever unreachable.
    """

    capacity: int
    queried: int = 0
    """Tokens that were looked up, in all."""
    hit: int = 0
    """Tokens that were found."""
    _blocks: OrderedDict[_Key, _Block] = field(default_factory=OrderedDict)
    _free: list[int] = field(default_factory=list)
    _serials: int = 0

    def __post_init__(self) -> None:
        self._free = list(range(self.capacity))[::-1]

    def __len__(self) -> int:
        return len(self._blocks)

    def _chain(self, tokens: Sequence[int], limit: int) -> list[tuple[_Key, _Block]]:
        found: list[tuple[_Key, _Block]] = []
        parent = -1
        for at in range(0, limit - BLOCK + 1, BLOCK):
            key = (parent, tuple(tokens[at : at + BLOCK]))
            block = self._blocks.get(key)
            if block is None:
                break
            found.append((key, block))
            parent = block.serial
        return found

    def match(self, tokens: Sequence[int], limit: int) -> list[int]:
        """Places of the longest known beginning of ``tokens[:limit]``, whole blocks only."""
        chain = self._chain(tokens, limit)
        self._touch([key for key, _ in chain])
        self.queried += limit
        self.hit += BLOCK * len(chain)
        return [block.place for _, block in chain]

    def keep(self, tokens: Sequence[int], limit: int) -> list[tuple[int, int]]:
        """Makes room for what is not yet known of ``tokens[:limit]``.

        Returns (index of the block in the sequence, its place) for each that the caller must fill
        now. What is kept may end before ``limit`` if the capacity is smaller.
        """
        chain = self._chain(tokens, min(limit, self.capacity * BLOCK))
        keys = [key for key, _ in chain]
        parent = chain[-1][1].serial if chain else -1
        self._touch(keys)
        wanted: list[tuple[int, int]] = []
        for index in range(len(chain), min(limit // BLOCK, self.capacity)):
            if not self._free:
                # Never one of this chain: it is the most recent and not longer than the capacity.
                _, evicted = self._blocks.popitem(last=False)
                self._free.append(evicted.place)
            key = (parent, tuple(tokens[index * BLOCK : (index + 1) * BLOCK]))
            block = _Block(self._free.pop(), self._serials)
            self._serials += 1
            self._blocks[key] = block
            keys.append(key)
            wanted.append((index, block.place))
            parent = block.serial
        self._touch(keys)
        return wanted

    def _touch(self, chain: Sequence[_Key]) -> None:
        # The end first, so that its beginning counts as used after it.
        for key in reversed(chain):
            self._blocks.move_to_end(key)

    def check_integrity(self) -> None:
        """AssertionError if a place is lost or a block cannot be reached."""
        used = [block.place for block in self._blocks.values()]
        assert sorted(used + self._free) == list(range(self.capacity))
        serials = {block.serial for block in self._blocks.values()} | {-1}
        assert all(parent in serials for parent, _ in self._blocks)
