"""Which sequences run in the next step, and how many of their tokens. Policy only, no torch.

The first ``num_computed_tokens`` tokens of a sequence have keys and values. Running a chunk
computes more of them; a chunk that reaches the end of the sequence samples one more token. Prefill,
decode, the output of a tool and recomputation after preemption are all this one operation.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import NamedTuple

from nanochat_ray.engine.kvcache.base import KVCacheManager, num_reusable_tokens
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE
from nanochat_ray.engine.prefill_cost import PrefillCostModel
from nanochat_ray.engine.request import EngineFull
from nanochat_ray.engine.sequence import Sequence


class ScheduledChunk(NamedTuple):
    """Tokens ``[start, start + num_tokens)`` of a sequence, to run in this step.

    Decided when the step is planned: it stays the same whatever happens to the sequence later. (A
    named tuple, since a frozen dataclass takes twice as long to make.)
    """

    sequence: Sequence
    start: int
    num_tokens: int
    is_decode: bool = False
    """Whether each token is computed as if it were alone."""
    draft: tuple[int, ...] = ()
    """Draft tokens behind the sequence's last token, which run as decodes too."""
    samples: bool = False
    """Whether the chunk reaches the end of the sequence, so that the next token is sampled."""
    num_logits: int = 0
    """Logits are needed of this many of the last tokens, draft tokens included."""
    prompt_logprobs: bool = False
    """Whether the log-probabilities of the prompt are computed from its logits."""
    input_from_previous_step: int | None = None
    """Row of the previous step that samples the chunk's only token, which the host does not know
    yet."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def is_plain_decode(self) -> bool:
        """Whether it computes the sequence's last token alone, as a decode."""
        return self.is_decode and self.samples and self.num_tokens == 1 and not self.draft

    @classmethod
    def of_decode(cls, sequence: Sequence) -> ScheduledChunk:
        """As ``of`` for the last token of a sequence that decodes, without draft tokens."""
        row = sequence.placeholder_row if sequence.num_placeholders else None
        return cls(sequence, sequence.num_computed_tokens, 1, True, (), True, 1, False, row)

    @classmethod
    def of(
        cls,
        sequence: Sequence,
        num_tokens: int,
        is_decode: bool = False,
        draft: tuple[int, ...] = (),
    ) -> ScheduledChunk:
        """The next ``num_tokens`` tokens of a sequence."""
        start = sequence.num_computed_tokens
        samples = start + num_tokens == sequence.num_tokens
        num_logits = (1 + len(draft)) * samples
        num_scored = 0
        if not is_decode and sequence.needs_prompt_logprobs:
            first = sequence.request.params.prompt_logprobs_start - 1
            num_scored = max(0, min(num_tokens, start + num_tokens - first))
        row = sequence.placeholder_row if sequence.num_placeholders else None
        return cls(
            sequence,
            start,
            num_tokens,
            is_decode,
            draft,
            samples,
            max(num_logits, num_scored),
            num_scored > 0,
            row,
        )


@dataclass(frozen=True)
class SchedulerOutput:
    """What one step computes."""

    chunks: list[ScheduledChunk]
    """Decodes by slot, then prompts in the order of admission."""
    admissions: list[Sequence]
    """Sequences that run for the first time, or again after preemption."""


def _rank(sequence: Sequence) -> tuple[int, int]:
    """The sequence with the largest rank is preempted first."""
    return sequence.request.priority, sequence.arrival


def _computes_prefix_of(chunk: ScheduledChunk, sequence: Sequence) -> bool:
    """Whether the chunk computes a block of the sequence's prompt, which the sequence can then
    match in the next step instead of computing it too."""
    end = chunk.start // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE
    if end > min(chunk.end, num_reusable_tokens(sequence)):
        return False
    other = chunk.sequence
    same_scope = other.request.cache_scope == sequence.request.cache_scope
    return same_scope and other.tokens[:end] == sequence.tokens[:end]


@dataclass
class Scheduler:
    """Slots and queues.

    Invariants: a sequence is either waiting (no slot) or running (a slot of its own); every plan
    contains all decodes, except those whose last token is in flight or that wait for memory; a plan
    never exceeds ``max_num_batched_tokens`` nor, while anything decodes, the budget of
    ``prefill_cost``.

    A sequence that gets no memory preempts those of a larger rank (lower priority, or later
    arrival); the one with the largest rank waits instead. The cache holds at least one sequence of
    the maximum length, so the first one always proceeds and there is no deadlock.
    """

    kv_cache: KVCacheManager
    num_slots: int
    max_num_batched_tokens: int
    prefill_chunk: int
    max_queue_size: int
    prefill_cost: PrefillCostModel = field(default_factory=PrefillCostModel)
    num_speculative_tokens: int = 0
    """Draft tokens of a sequence in one step, at most."""
    speculative_disable_by_batch_size: int = 0
    """Draft tokens are added only while the batch has fewer tokens than this (0: no limit)."""
    running: list[Sequence] = field(default_factory=list)
    waiting: list[Sequence] = field(default_factory=list)
    num_preemptions: int = 0
    _free_slots: list[int] = field(default_factory=list)
    _num_arrivals: int = 0
    _last_admission: dict[str, int] = field(default_factory=dict)
    """Order in which clients had a request admitted last; cleared when no request waits."""

    def __post_init__(self) -> None:
        self._free_slots = list(range(self.num_slots))

    @property
    def queue_capacity(self) -> int:
        """Requests that can still be added."""
        return self.max_queue_size + len(self._free_slots) - len(self.waiting)

    @property
    def has_prompts(self) -> bool:
        """Whether a sequence waits, or has tokens to compute before its next one is sampled."""
        return bool(self.waiting) or not all(s.is_decoding for s in self.running)

    def add(self, sequence: Sequence) -> None:
        """Raises EngineFull if the queue is full; not for a request that has output, since its
        client reads that already."""
        if self.queue_capacity <= 0 and not sequence.request.output_token_ids:
            raise EngineFull(f"max_queue_size={self.max_queue_size} requests are waiting already")
        sequence.arrival, sequence.arrival_time = self._num_arrivals, time.monotonic()
        self._num_arrivals += 1
        self.waiting.append(sequence)

    def plan(self) -> SchedulerOutput:
        """Admits waiting sequences and plans the next step."""
        admissions = self._admit()
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for s in self.running:
            # A placeholder at the maximum length is the last token: nothing is left to compute.
            if not s.num_placeholders or len(s.tokens) + s.num_placeholders < s.max_length:
                (decodes if s.is_decoding else prefills).append(s)
        num_preemptions = self.num_preemptions
        budget = self.max_num_batched_tokens - len(decodes)
        chunks = self._plan_prefills(prefills, len(decodes), budget)
        budget -= sum(chunk.num_tokens for chunk in chunks)
        chunks += self._plan_decodes(decodes, budget)
        if self.num_preemptions > num_preemptions:
            chunks = [chunk for chunk in chunks if chunk.sequence.slot >= 0]
        # Stable: prompts stay in the order of admission.
        chunks.sort(key=lambda c: c.sequence.slot if c.is_decode else self.num_slots)
        return SchedulerOutput(chunks, [s for s in admissions if s.slot >= 0])

    def _plan_prefills(
        self, prefills: SequenceOf[Sequence], num_decodes: int, max_tokens: int
    ) -> list[ScheduledChunk]:
        """Chunks of prompts, and of tokens that are recomputed."""
        chunks: list[ScheduledChunk] = []
        budget = float(max_tokens)
        if num_decodes:
            prompts = [
                (s.num_tokens - s.num_cached_tokens, s.num_tokens - s.num_computed_tokens)
                for s in prefills
            ]
            cost = self.prefill_cost.budget(self.prefill_chunk, prompts, num_decodes)
            budget = float(min(max_tokens, cost))
        for s in prefills:
            if budget < 1:
                break
            if s.slot < 0:
                continue  # preempted for a sequence before it
            if s.num_computed_tokens == 0 and self.kv_cache.caches_prefixes:
                if any(_computes_prefix_of(chunk, s) for chunk in chunks):
                    continue
                s.num_cached_tokens = s.num_computed_tokens = self.kv_cache.match_prefix(s)
            end, is_decode = s.next_span()
            # Late in a long prompt a token takes longer, and the decodes wait for it.
            cost_per_token = self.prefill_cost.token_cost(s.num_computed_tokens)
            cost_per_token = cost_per_token if num_decodes else 1.0
            num_tokens = min(end - s.num_computed_tokens, max(1, int(budget / cost_per_token)))
            if self._allocate(s, s.num_computed_tokens + num_tokens):
                chunks.append(ScheduledChunk.of(s, num_tokens, is_decode))
                budget -= num_tokens * cost_per_token
        return chunks

    def _plan_decodes(
        self, decodes: SequenceOf[Sequence], max_draft_tokens: int
    ) -> list[ScheduledChunk]:
        """One token of each sequence, and draft tokens where they fit."""
        chunks: list[ScheduledChunk] = []
        if self.speculative_disable_by_batch_size:
            limit = self.speculative_disable_by_batch_size - len(decodes)
            max_draft_tokens = min(max_draft_tokens, limit)
        for s in decodes:
            length = s.num_computed_tokens + 1
            if length > s.num_allocated_tokens and not self._allocate(s, length):
                continue
            if not self.num_speculative_tokens or max_draft_tokens <= 0:
                chunks.append(ScheduledChunk.of_decode(s))
                continue
            # The token that is sampled behind the last draft token must fit too.
            most = min(max_draft_tokens, s.max_length - s.num_tokens - 1)
            draft = s.propose_draft(min(self.num_speculative_tokens, most))
            # No sequence is preempted for draft tokens.
            if draft and not self.kv_cache.allocate(s, s.num_computed_tokens + 1 + len(draft)):
                draft = ()
            chunks.append(ScheduledChunk.of(s, 1, True, draft))
            max_draft_tokens -= len(draft)
        return chunks

    def can_speculate(self, num_decodes: int) -> bool:
        """Whether a step with this many decodes has room for draft tokens."""
        limit = self.speculative_disable_by_batch_size
        return self.num_speculative_tokens > 0 and (not limit or num_decodes < limit)

    def _allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Whether the sequence runs and has memory for its first ``num_tokens`` tokens, if need be
        that of sequences with a larger rank."""
        if sequence.slot < 0:
            return False
        while not self.kv_cache.allocate(sequence, num_tokens):
            last = max((s for s in self.running if self.kv_cache.frees_memory(s)), key=_rank)
            if _rank(last) <= _rank(sequence):
                return False
            self.preempt(last)
        return True

    def expire(self, now: float) -> list[Sequence]:
        """Removes and returns the sequences whose deadline is at ``now`` or before."""
        expired_sequences = [
            s
            for s in (*self.running, *self.waiting)
            if s.request.deadline is not None and s.request.deadline <= now
        ]
        for s in expired_sequences:
            self.remove(s)
        return expired_sequences

    def _admit(self) -> list[Sequence]:
        if not self.waiting:
            self._last_admission.clear()
        admissions: list[Sequence] = []
        queues = self._queues()
        num_running = Counter(s.request.client for s in self.running)
        while queues:
            # Within a priority the client with the fewest running requests goes first, among
            # several the one that was admitted longest ago, and of its requests the first.
            queue = min(
                queues,
                key=lambda queue: (
                    queue[-1].request.priority,
                    num_running[queue[-1].request.client],
                    self._last_admission.get(queue[-1].request.client, -1),
                    queue[-1].arrival,
                ),
            )
            first = queue[-1]
            if first.num_placeholders:
                break  # it was preempted while its last token is in flight
            if not self._free_slots or not self.kv_cache.can_admit(first, self.running):
                last = max(self.running, key=_rank)
                if last.request.priority <= first.request.priority:
                    break
                self.preempt(last)
                queues = self._queues()
                num_running[last.request.client] -= 1
                continue
            queue.pop()
            queues = [queue for queue in queues if queue]
            self.waiting.remove(first)
            latest = max(self._last_admission.values(), default=-1)
            self._last_admission[first.request.client] = latest + 1
            first.slot = heapq.heappop(self._free_slots)
            self.running.append(first)
            num_running[first.request.client] += 1
            admissions.append(first)
        return admissions

    def _queues(self) -> list[list[Sequence]]:
        """The waiting sequences of each priority and client; the last of a list came first."""
        queues: dict[tuple[int, str], list[Sequence]] = {}
        for s in self.waiting:
            queues.setdefault((s.request.priority, s.request.client), []).append(s)
        for queue in queues.values():
            queue.sort(key=lambda s: s.arrival, reverse=True)
        return list(queues.values())

    def preempt(self, sequence: Sequence) -> None:
        """Takes the slot and memory of a sequence, which waits again. Its tokens are recomputed to
        the same values."""
        self._release(sequence)
        sequence.num_computed_tokens = 0
        self.num_preemptions += 1
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Finishes a sequence that waits or runs."""
        sequence.is_finished = True
        if sequence.slot >= 0:
            self._release(sequence)
        else:
            self.waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.kv_cache.free(sequence)
        heapq.heappush(self._free_slots, sequence.slot)
        sequence.slot = -1

    def check_integrity(self) -> None:
        """AssertionError unless every slot is free or has one running sequence, and likewise the
        memory of the cache."""
        slots = [s.slot for s in self.running]
        assert sorted(slots + self._free_slots) == list(range(self.num_slots)), slots
        assert all(s.slot == -1 and s.num_computed_tokens == 0 for s in self.waiting)
        assert not set(map(id, self.running)) & set(map(id, self.waiting))
        self.kv_cache.check_integrity(self.running)
