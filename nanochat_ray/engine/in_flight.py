"""A step whose tokens are sampled, perhaps only on the device yet.

S rows that are sampled from, V tokens of the vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.engine.cuda_graphs import StepResult
from nanochat_ray.engine.grammar import Grammars
from nanochat_ray.engine.logprobs import LogprobTable, PromptLogprobs
from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.engine.sampling_state import SamplingState
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.sequence import PLACEHOLDER
from nanochat_ray.machine import send

T = TypeVar("T")


@dataclass(frozen=True)
class ForwardOutput:
    """A step whose tokens are not sampled yet."""

    logits: Tensor
    """float32 ``[R, V]``"""
    sampling_chunks: list[tuple[int, ScheduledChunk]]
    """The chunks that sample, each with the row of its last token; those of its draft tokens
    follow."""
    prompt_logprobs: PromptLogprobs | None = None
    token_ids: Tensor | None = None
    """int64 ``[R]``: see ``StepResult``."""

    @classmethod
    def of(cls, chunks: Sequence[ScheduledChunk], result: StepResult) -> Self:
        """``num_logits`` rows of the result are those of a chunk."""
        ends = itertools.accumulate([chunk.num_logits for chunk in chunks])
        sampling_chunks = [
            (end - 1 - len(chunk.draft), chunk)
            for end, chunk in zip(ends, chunks, strict=True)
            if chunk.samples
        ]
        scores_prompt = any(chunk.prompt_logprobs for chunk in chunks)
        prompt_logprobs = PromptLogprobs(chunks, result.logits) if scores_prompt else None
        return cls(result.logits, sampling_chunks, prompt_logprobs, result.token_ids)

    @property
    def needs_previous_tokens(self) -> bool:
        """Whether the tokens of the previous step must be known before sampling, since a grammar's
        mask depends on them."""
        return any(chunk.sequence.grammar is not None for _, chunk in self.sampling_chunks)


@dataclass(frozen=True)
class InFlightStep:
    """The sampled tokens of a step: one row for each chunk that samples, and one for each of its
    draft tokens."""

    chunks: list[ScheduledChunk]
    token_ids: Tensor
    """int64 ``[S]`` on the device; negative where no token could be sampled."""
    host_token_ids: Tensor
    """The same on the CPU, once ``event`` has happened."""
    logprobs: LogprobTable
    prompt_logprobs: PromptLogprobs | None
    event: torch.cuda.Event | None

    @classmethod
    def launch(
        cls,
        chunks: list[ScheduledChunk],
        token_ids: Tensor,
        logprobs: LogprobTable,
        prompt_logprobs: PromptLogprobs | None,
    ) -> InFlightStep:
        """Starts the copies to the CPU."""
        host_token_ids, event = token_ids, None
        if token_ids.is_cuda:
            host_token_ids = token_ids.to("cpu", non_blocking=True)  # to pinned memory
            logprobs.fetch()
            if prompt_logprobs is not None:
                prompt_logprobs.table.fetch()
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(token_ids.device))
        return cls(chunks, token_ids, host_token_ids, logprobs, prompt_logprobs, event)

    @property
    def has_draft(self) -> bool:
        """Whether a chunk has draft tokens, so that the number of new tokens is not known yet."""
        return any(chunk.draft for chunk in self.chunks)

    def add_placeholders(self) -> None:
        """Lets the next step be planned behind the tokens of this one."""
        for row, chunk in enumerate(self.chunks):
            s = chunk.sequence
            if s.needs_token_at(chunk.end):
                s.num_placeholders, s.placeholder_row = 1, row

    def input_ids(self) -> Tensor:
        """int64 ``[S]`` on the device: the sampled tokens as input of the next step. A row without
        a token gets any, since its request fails and its row of the next step is discarded."""
        return self.token_ids.clamp_min(0)

    def wait(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """Token ids and their log-probabilities as ``LogprobTable.read``, once the step is done.

        Also called for steps that sample nothing: the device never has more than one step queued.
        """
        if self.event is not None:
            self.event.synchronize()
        if self.prompt_logprobs is not None:
            self.prompt_logprobs.store()
        return self.host_token_ids.tolist(), self.logprobs.read()


@dataclass
class SampledRows:
    """The rows of a step that are sampled from: one for each chunk, then one for each of its draft
    tokens."""

    chunks: list[ScheduledChunk]
    rows: list[int]
    """Those of the logits."""
    slots: list[int]
    positions: list[int]
    """Of the tokens that are sampled."""

    @classmethod
    def of(cls, sampling_chunks: Sequence[tuple[int, ScheduledChunk]]) -> Self:
        """Without chunks of sequences that the previous step, committed since, has ended."""
        pairs = [(row, c) for row, c in sampling_chunks if c.sequence.needs_token_at(c.end)]
        chunks = [c for _, c in pairs]
        rows, slots = [row for row, _ in pairs], [c.sequence.slot for c in chunks]
        result = cls(chunks, rows, slots, [c.end for c in chunks])
        if any(c.draft for c in chunks):
            result.slots = result.for_each_row(slots)
            result.rows = [row + i for row, c in pairs for i in range(1 + len(c.draft))]
            result.positions = [c.end + i for c in chunks for i in range(1 + len(c.draft))]
        return result

    def for_each_row(self, values: Sequence[T]) -> list[T]:
        """The value of each chunk for each of its rows."""
        pairs = zip(values, self.chunks, strict=True)
        return [value for value, chunk in pairs for _ in range(1 + len(chunk.draft))]

    def uncounted_tokens(
        self, has_previous: bool
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Pairs of a row and a token before it that penalties must count; pairs of an index in
        these and the row of the previous step that samples the token, if one is in flight."""
        tokens: list[tuple[int, int]] = []
        in_flight: list[tuple[int, int]] = []
        first = 0
        for chunk in self.chunks:
            draft, row = chunk.draft, chunk.input_from_previous_step
            if row is not None and has_previous:
                in_flight.append((len(tokens), row))
                tokens.append((first, PLACEHOLDER))
            tokens += [(first + i + 1, t) for i in range(len(draft)) for t in draft[: i + 1]]
            first += 1 + len(draft)
        return tokens, in_flight

    def grammar_masks(self, grammars: Grammars) -> tuple[list[int], np.ndarray] | None:
        """The rows with a grammar, and the tokens that it allows there, bool ``[G, V]``."""
        states = [(c.sequence.grammar, c.draft) for c in self.chunks]
        with_grammar = self.for_each_row([grammar is not None for grammar, _ in states])
        rows = [row for row, has_grammar in enumerate(with_grammar) if has_grammar]
        if not rows:
            return None
        return rows, grammars.next_token_mask([(g, draft) for g, draft in states if g is not None])


def sample(
    forward: ForwardOutput,
    sampling: SamplingState,
    grammars: Grammars | None,
    previous_ids: Tensor | None = None,
) -> InFlightStep:
    """Samples a token behind each chunk and behind each of its draft tokens. ``previous_ids``
    int64 are the tokens of the previous step if that is still in flight."""
    rows = SampledRows.of(forward.sampling_chunks)
    logits = forward.logits
    if len(rows.rows) < len(logits):
        logits = logits[send(torch.tensor(rows.rows, dtype=torch.int64), logits.device)]
    masks, device_tokens = None, None
    uncounted_tokens: list[tuple[int, int]] = []
    if grammars is not None and forward.needs_previous_tokens:
        masks = rows.grammar_masks(grammars)
    if sampling.counts_tokens:
        uncounted_tokens, in_flight = rows.uncounted_tokens(previous_ids is not None)
        if in_flight:
            assert previous_ids is not None
            device_tokens = in_flight, previous_ids
    arguments = (rows.slots, rows.positions, masks, uncounted_tokens, device_tokens)
    token_ids = forward.token_ids
    if token_ids is None or logits is not forward.logits or masks or sampling.adjusts(rows.slots):
        token_ids = sampling.choose(logits, *arguments)
    top_logprobs = [c.sequence.request.params.logprobs for c in rows.chunks]
    if top_logprobs.count(None) == len(top_logprobs):
        logprobs = LogprobTable(logits, token_ids, [])
    else:
        params = rows.for_each_row([c.sequence.request.params for c in rows.chunks])
        is_processed = [p.reports_processed_logprobs for p in params]
        if all(is_processed):
            logits = sampling.distribution(logits, *arguments)
        elif any(is_processed):
            mask_R1 = send(torch.tensor(is_processed), logits.device)[:, None]
            logits = torch.where(mask_R1, sampling.distribution(logits, *arguments), logits)
        logprobs = LogprobTable(logits, token_ids, [p.logprobs for p in params])
    return InFlightStep.launch(rows.chunks, token_ids, logprobs, forward.prompt_logprobs)
