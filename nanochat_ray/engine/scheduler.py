"""Who runs in the next step, and on how many tokens. No torch: policy only.

Every sequence is a list of tokens of which the first ``computed`` have keys and values. Running a
chunk computes more of them; when a chunk reaches the end of the list, one more token is sampled.
Prefill, decode, a tool's output and recomputation after preemption are all this one thing.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanochat_ray.engine.request import EngineFull, Request
from nanochat_ray.engine.tools import ToolState

if TYPE_CHECKING:
    from nanochat_ray.engine.grammar import GrammarState


@dataclass(eq=False)
class Sequence:
    """A request while the engine has it."""

    request: Request
    tokens: list[int]
    """Prompt and answer so far."""
    seed: int
    limit: int
    """Length of ``tokens`` at which it is cut."""
    tool: ToolState | None = None
    grammar: GrammarState | None = None
    computed: int = 0
    prefill_until: int = 0
    """Tokens before this place are run as a prompt, not as a decode. Which of the two it is must
    not depend on how chunks fall, since they differ in the last bit."""
    decoded: bool = False
    """Whether a token was sampled since it got its slot."""
    slot: int = -1
    order: int = 0
    """Admission goes by it; it survives preemption."""
    ending: frozenset[int] = frozenset()
    cached: int = 0
    """Prompt tokens that were found computed when it was admitted last."""

    @property
    def pending(self) -> int:
        return len(self.tokens) - self.computed

    @property
    def decoding(self) -> bool:
        return self.computed >= self.prefill_until


@dataclass(frozen=True)
class Chunk:
    """Tokens ``[start, start + count)`` of a sequence are to be run in this step."""

    sequence: Sequence
    start: int
    count: int
    decode: bool = False
    """One token that was sampled in an earlier step."""

    @property
    def samples(self) -> bool:
        """Whether the next token can be sampled after it."""
        return self.start + self.count == len(self.sequence.tokens)


@dataclass
class Scheduler:
    """Slots and queues.

    Invariants: a sequence is either waiting (no slot) or running (a slot of its own); decodes are
    in every plan; a plan never exceeds ``token_budget``, nor ``prefill_chunk`` prompt tokens while
    anything decodes.
    """

    slots: int
    token_budget: int
    prefill_chunk: int
    max_waiting: int
    on_admit: Callable[[Sequence], None] = lambda sequence: None
    """Called when a sequence has got its slot; may set ``computed`` to what it found of it."""
    running: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    preemptions: int = 0
    _free: list[int] = field(default_factory=list)
    _orders: int = 0

    def __post_init__(self) -> None:
        self._free = list(range(self.slots))

    @property
    def room(self) -> int:
        """Requests that may still come."""
        return self.max_waiting + len(self._free) - len(self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Raises EngineFull when as many wait as may."""
        if self.room <= 0:
            raise EngineFull(f"max_waiting={self.max_waiting} requests are waiting already")
        sequence.order = self._orders
        self._orders += 1
        self.waiting.append(sequence)

    def plan(self) -> list[Chunk]:
        """Admits whom there is room for; chunks of the next step, decodes first, by slot."""
        self._admit()
        chunks = [Chunk(s, s.computed, 1, True) for s in self.running if s.decoding]
        chunks.sort(key=lambda chunk: chunk.sequence.slot)
        budget = self.token_budget - len(chunks)
        if chunks:
            budget = min(budget, self.prefill_chunk)
        for s in self.running:
            if budget <= 0:
                break
            if not s.decoding:
                count = min(s.pending, budget)
                chunks.append(Chunk(s, s.computed, count))
                budget -= count
        return chunks

    def _admit(self) -> None:
        while self.waiting:
            shares = Counter(s.request.client for s in self.running)
            # Among equals the client that runs least goes first, then who came first.
            first = min(
                self.waiting,
                key=lambda s: (s.request.priority, shares[s.request.client], s.order),
            )
            if not self._free:
                last = max(self.running, key=lambda s: (s.request.priority, s.order))
                if last.request.priority <= first.request.priority:
                    break
                self.preempt(last)
            self.waiting.remove(first)
            first.slot = heapq.heappop(self._free)
            self.running.append(first)
            self.on_admit(first)

    def preempt(self, sequence: Sequence) -> None:
        """Takes its slot; it waits again and its tokens are recomputed, with the same outcome."""
        self._release(sequence)
        sequence.computed, sequence.prefill_until = 0, len(sequence.tokens)
        sequence.decoded = False
        self.preemptions += 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forgets a sequence, wherever it is."""
        if sequence.slot >= 0:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        heapq.heappush(self._free, sequence.slot)
        sequence.slot = -1

    def check_integrity(self) -> None:
        """Every slot is free or has one running sequence. AssertionError if not."""
        used = [s.slot for s in self.running]
        assert sorted(used + self._free) == list(range(self.slots)), (used, self._free)
        assert all(s.slot == -1 and s.computed == 0 for s in self.waiting)
        assert not set(map(id, self.running)) & set(map(id, self.waiting))
