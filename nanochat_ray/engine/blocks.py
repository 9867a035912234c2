"""Who holds which blocks of keys and values, and which beginnings they are of. No torch.

A block of tokens is known by a hash chain: a digest of its tokens and of the digest of the block
before it (of the first one: of its scope), so that it is found only behind the very same beginning
and by the same ones who may share it. Two layouts stand on this:

- paged: a sequence holds blocks and grows by taking more; beginnings that it has in common with
  others are held by all of them, and layers with windows give back what no token will see again;
- slots: the blocks are copies of beginnings and nobody holds them (``keep``).
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

BLOCK = 16
"""Tokens of a block."""
VOID = -1
"""Stands for a block that was given back, since it is behind every window."""

Held = list[list[int]]
"""Blocks of one sequence: for each pool its places, in the order of the tokens."""


def chain(tokens: Sequence[int], limit: int, block: int, scope: str = "") -> list[bytes]:
    """The names of the whole blocks of ``tokens[:limit]``; no two scopes have one in common."""
    numbers = array("q", tokens[: limit // block * block])
    data, size = numbers.tobytes(), block * numbers.itemsize
    names: list[bytes] = []
    name = hashlib.sha256(scope.encode("utf-8", "surrogatepass")).digest() if scope else b""
    for at in range(0, len(data), size):
        # Not Python's hash: who sends prompts must not be able to make two of them collide.
        name = hashlib.sha256(name + data[at : at + size]).digest()
        names.append(name)
    return names


@dataclass
class BlockPool:
    """``capacity`` places for blocks of those layers that see ``window`` earlier tokens (-1: all).

    Invariants: a place is free, idle (nobody holds it, but what lies there is known) or held; a
    name stands for one place.
    """

    capacity: int
    window: int = -1
    _free: list[int] = field(init=False)
    _idle: OrderedDict[int, None] = field(default_factory=OrderedDict)
    """Least recently used first."""
    _holders: list[int] = field(init=False)
    _known: dict[bytes, int] = field(default_factory=dict)
    _names: dict[int, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free = list(range(self.capacity))[::-1]
        self._holders = [0] * self.capacity

    @property
    def room(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._idle)

    def knows(self, name: bytes) -> bool:
        return name in self._known

    def take(self) -> int:
        """A place to fill, for one holder. There must be room."""
        if self._free:
            place = self._free.pop()
        else:
            place, _ = self._idle.popitem(last=False)
            del self._known[self._names.pop(place)]
        self._holders[place] = 1
        return place

    def claim(self, name: bytes) -> int:
        """The place that is known by this name, for one more holder."""
        place = self._known[name]
        self._idle.pop(place, None)
        self._holders[place] += 1
        return place

    def name(self, place: int, name: bytes) -> None:
        """Says what lies there now. Where another place has that already, this one stays without
        a name."""
        if place not in self._names and name not in self._known:
            self._known[name], self._names[place] = place, name

    def release(self, places: Sequence[int]) -> None:
        """One holder less for each of a sequence's blocks."""
        # The end first: it is then evicted before the beginning, without which nobody finds it.
        for place in reversed(places):
            if place == VOID:
                continue
            self._holders[place] -= 1
            if self._holders[place] == 0:
                if place in self._names:
                    self._idle[place] = None
                else:
                    self._free.append(place)

    def check_integrity(self, held: Iterable[Sequence[int]]) -> None:
        """AssertionError if a place is lost, held by others than these, or has a wrong name."""
        holders = Counter(place for places in held for place in places if place != VOID)
        assert [holders[place] for place in range(self.capacity)] == self._holders
        assert sorted([*self._free, *self._idle, *holders]) == list(range(self.capacity))
        assert self._known == {name: place for place, name in self._names.items()}
        assert self._names.keys() >= self._idle.keys()


class Blocks:
    """Blocks of sequences in one pool for each kind of layer. ``step`` is how many tokens a
    sequence computes at once, at most."""

    def __init__(self, pools: Sequence[BlockPool], block: int = BLOCK, step: int = 1):
        self.pools, self.block, self.step = tuple(pools), block, step
        self.queried = self.hit = 0
        """Tokens that were looked up, and those that were found, in all."""

    def empty(self) -> Held:
        return [[] for _ in self.pools]

    @property
    def used(self) -> float:
        """Share that is held of the pool with the least room."""
        return max(1 - pool.room / pool.capacity for pool in self.pools)

    def need(self, pool: BlockPool, length: int) -> int:
        """Blocks that a sequence of so many tokens holds at once, at most."""
        whole = -(-length // self.block)
        if pool.window < 0:
            return whole
        return min(whole, -(-(pool.window + self.step) // self.block) + 1)

    def _gone(self, pool: BlockPool, start: int) -> int:
        """Leading blocks that no token from ``start`` on sees."""
        return 0 if pool.window < 0 else max(0, start - pool.window) // self.block

    def admits(self, length: int, running: Iterable[tuple[Held, int]]) -> bool:
        """Whether a sequence of so many tokens has room beside those that run, each with what it
        holds and its tokens, when they have got what they need."""
        running = list(running)
        for i, pool in enumerate(self.pools):
            due = self.need(pool, length)
            for held, tokens in running:
                has = len(held[i]) - held[i].count(VOID)
                due += max(0, self.need(pool, tokens) - has)
            if due > pool.room:
                return False
        return True

    def extend(self, held: Held, start: int, end: int) -> bool:
        """Makes room for tokens ``[start, end)``, in every pool or in none; gives back first what
        is behind the windows."""
        more = -(-end // self.block) - len(held[0])
        for pool, places in zip(self.pools, held, strict=True):
            for i in range(min(self._gone(pool, start), len(places)) - 1, -1, -1):
                if places[i] == VOID:
                    break
                pool.release(places[i : i + 1])
                places[i] = VOID
        if any(pool.room < more for pool in self.pools):
            return False
        for pool, places in zip(self.pools, held, strict=True):
            places.extend(pool.take() for _ in range(more))
        return True

    def release(self, held: Held) -> None:
        for pool, places in zip(self.pools, held, strict=True):
            pool.release(places)

    def match(self, tokens: Sequence[int], limit: int, scope: str = "") -> Held:
        """The longest known beginning of ``tokens[:limit]``, whole blocks, held from now on.

        Of layers with windows only what the token behind it sees must be known.
        """
        names = chain(tokens, limit, self.block, scope)
        best = 0
        runs = [0] * len(self.pools)  # blocks up to here that are known without a gap
        for count, name in enumerate(names, 1):
            runs = [
                run + 1 if p.knows(name) else 0 for run, p in zip(runs, self.pools, strict=True)
            ]
            if not any(runs):
                break
            end = count * self.block
            seen = (count - self._gone(pool, end) for pool in self.pools)
            if all(run >= n for run, n in zip(runs, seen, strict=True)):
                best = count
        self.queried += limit
        self.hit += best * self.block
        held: Held = []
        for pool in self.pools:
            gone = self._gone(pool, best * self.block)
            held.append([VOID] * gone + [pool.claim(name) for name in names[gone:best]])
        return held

    def register(self, held: Held, tokens: Sequence[int], limit: int, scope: str = "") -> None:
        """From now on the whole blocks of ``tokens[:limit]``, which are computed, can be found."""
        names = chain(tokens, limit, self.block, scope)
        for pool, places in zip(self.pools, held, strict=True):
            for place, name in zip(places, names, strict=False):
                if place != VOID:
                    pool.name(place, name)

    def keep(self, tokens: Sequence[int], limit: int, scope: str = "") -> list[tuple[int, int]]:
        """Makes room for what is not yet known of ``tokens[:limit]``, held by nobody. One pool.

        Returns (index of the block in the sequence, its place) for each that the caller must fill
        now. What is kept may end before ``limit`` if the capacity is smaller.
        """
        (pool,) = self.pools
        names = chain(tokens, min(limit, pool.capacity * self.block), self.block, scope)
        places: list[int] = []
        wanted: list[tuple[int, int]] = []
        for index, name in enumerate(names):
            fresh = not pool.knows(name)
            places.append(pool.take() if fresh else pool.claim(name))
            if fresh:
                pool.name(places[-1], name)
                wanted.append((index, places[-1]))
        pool.release(places)
        return wanted

    def check_integrity(self, held: Sequence[Held]) -> None:
        """AssertionError if a block is lost or held by others than these."""
        for i, pool in enumerate(self.pools):
            pool.check_integrity([blocks[i] for blocks in held])
