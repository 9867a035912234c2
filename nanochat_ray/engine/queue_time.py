"""How long a request would wait for a slot, from the measured speed of the engine. No torch.

The running sequences hold their slots for as many steps as they have tokens left, and each waiting
one takes the slot that is free first (list scheduling: Graham, 1966). A step takes as long as the
latest steps with a full batch, and an answer has as many tokens as the latest ones, but no more
than it may. What this leaves out (other load of the machine, lengths that vary) is corrected by
the ratio of the waits that were measured to those that were expected.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

from nanochat_ray.engine.request import Request
from nanochat_ray.engine.sequence import Sequence

FULL_SHARE = 0.75
"""Share of the slots from which a batch counts as full."""
MAX_SURPRISE = 4.0
"""A step counts as this many times the mean at most: one that compiles a kernel is no trend."""
MAX_CORRECTION = 4.0
"""By which the measured waits change an estimate at most, up or down."""


@dataclass
class Mean:
    """Of the latest ``window`` values, roughly; exact until there are that many."""

    window: int
    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, self.window)
        self.value += (value - self.value) / self.count


@dataclass
class QueueTime:
    """Measurements of one engine, and estimates from them.

    The engine's thread records; any thread may ask, and then sees a step that is under way.
    """

    num_slots: int
    full_step_s: Mean = field(default_factory=lambda: Mean(16))
    any_step_s: Mean = field(default_factory=lambda: Mean(16))
    """Stands in until there was a full batch. Fewer sequences take less time, so the first
    estimates are too short rather than too long."""
    chunk_tokens: Mean = field(default_factory=lambda: Mean(32))
    """Prompt tokens that a step computes of one prompt."""
    output_tokens: Mean = field(default_factory=lambda: Mean(64))
    estimates_s: Mean = field(default_factory=lambda: Mean(32))
    """Times to the first token that were expected, before correction …"""
    waits_s: Mean = field(default_factory=lambda: Mean(32))
    """… and measured."""
    num_waits: int = 0
    total_wait_s: float = 0.0
    """Of all of these since the start."""

    def record_step(self, seconds: float, num_sequences: int, prompt_chunks: list[int]) -> None:
        """A step with ``num_sequences``, of which ``prompt_chunks`` were tokens of prompts."""
        is_full = num_sequences >= FULL_SHARE * self.num_slots
        mean = self.full_step_s if is_full else self.any_step_s
        mean.add(min(seconds, MAX_SURPRISE * mean.value) if mean.count else seconds)
        for num_tokens in prompt_chunks:
            self.chunk_tokens.add(num_tokens)

    def record_output(self, num_tokens: int) -> None:
        """An answer of so many tokens is complete."""
        self.output_tokens.add(num_tokens)

    def record_wait(self, estimate_s: float, seconds: float) -> None:
        """The first token of a request that had to wait for a slot came after ``seconds``."""
        self.record_late(estimate_s, seconds)
        self.num_waits += 1
        self.total_wait_s += seconds

    def record_late(self, estimate_s: float, seconds: float) -> None:
        """It had not come by then, and will not."""
        self.estimates_s.add(estimate_s)
        self.waits_s.add(seconds)

    @property
    def correction(self) -> float:
        """Of estimates; 1 while nothing is measured."""
        if not self.estimates_s.value:
            return 1.0
        ratio = self.waits_s.value / self.estimates_s.value
        return min(MAX_CORRECTION, max(1 / MAX_CORRECTION, ratio))

    def wait_s(
        self,
        request: Request,
        running: Iterable[Sequence],
        waiting: Iterable[Sequence],
        arrivals: Iterable[Request] = (),
    ) -> float:
        """Seconds until a request gets a slot, if it comes behind all of these; 0 until an answer
        has been complete. ``arrivals`` are requests that are no sequences yet."""
        return (
            self.correction
            * self.step_s
            * self._steps_until_slot(request, running, waiting, arrivals)
        )

    @property
    def step_s(self) -> float:
        return (self.full_step_s if self.full_step_s.count else self.any_step_s).value

    def first_token_s(self, request: Request, wait_s: float) -> float:
        """What ``record_wait`` compares: that of a request with this ``wait_s``, not corrected."""
        prompt_steps = self._steps(len(request.prompt), 1)
        return wait_s / self.correction + prompt_steps * self.step_s

    def _steps_until_slot(
        self,
        request: Request,
        running: Iterable[Sequence],
        waiting: Iterable[Sequence],
        arrivals: Iterable[Request],
    ) -> float:
        if not self.output_tokens.count:
            return 0.0
        queue = [(s.request, self._steps_left(s)) for s in waiting]
        queue += [(r, self._steps(len(r.prompt), r.params.max_tokens)) for r in arrivals]
        slots = [self._steps_left(s) for s in running]
        slots += [0.0] * (self.num_slots - len(slots))
        heapq.heapify(slots)
        for steps in _steps_before(request, queue):
            heapq.heapreplace(slots, slots[0] + steps)
        return slots[0]

    def _steps_left(self, sequence: Sequence) -> float:
        prompt_tokens = len(sequence.tokens) - sequence.num_computed_tokens - 1
        num_outputs = len(sequence.tokens) - len(sequence.request.prompt)
        most = sequence.max_length - len(sequence.request.prompt)
        return self._steps(max(0, prompt_tokens), most, num_outputs)

    def _steps(self, prompt_tokens: int, max_tokens: int, num_outputs: int = 0) -> float:
        """For which a request will hold its slot; one beyond the usual length ends at once."""
        chunk = self.chunk_tokens.value or 1.0
        return prompt_tokens / chunk + max(
            1.0, min(max_tokens, self.output_tokens.value) - num_outputs
        )


def _steps_before(request: Request, queue: SequenceOf[tuple[Request, float]]) -> list[float]:
    """Those of the requests that get a slot first. Slots are shared fairly between clients
    (``Scheduler``), so of another client that has more requests only as many count as this one has,
    and one more."""
    priority, client = request.priority, request.client
    num_own = sum(r.client == client and r.priority == priority for r, _ in queue)
    counts: Counter[str] = Counter()
    steps_before = []
    for other, steps in queue:
        if other.priority > priority:
            continue
        if other.priority == priority and other.client != client:
            counts[other.client] += 1
            if counts[other.client] > num_own + 1:
                continue
        steps_before.append(steps)
    return steps_before
