"""A step whose tokens are sampled, perhaps only on the device yet.

S rows that are sampled from, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from nanochat_ray.engine.grammar import Grammars, GrammarState
from nanochat_ray.engine.logprobs import LogprobTable, PromptLogprobs
from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.engine.sampling_state import SamplingState
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.sequence import PLACEHOLDER
from nanochat_ray.machine import send


@dataclass(frozen=True)
class ForwardOutput:
    """A step whose tokens are not sampled yet."""

    logits: Tensor
    """float32 ``[R, V]``"""
    sampling_chunks: list[tuple[int, ScheduledChunk]]
    """The chunks that sample, each with the row of its last token; those of its draft tokens
    follow."""
    prompt_logprobs: PromptLogprobs | None = None

    @classmethod
    def of(cls, chunks: Sequence[ScheduledChunk], logits: Tensor) -> Self:
        """``logits [R, V]``: ``num_logits`` rows of each chunk."""
        sampling_chunks: list[tuple[int, ScheduledChunk]] = []
        num_logits = 0
        for chunk in chunks:
            num_logits += chunk.num_logits
            if chunk.samples:
                sampling_chunks.append((num_logits - 1 - len(chunk.draft), chunk))
        scores_prompt = any(chunk.prompt_logprobs for chunk in chunks)
        prompt_logprobs = PromptLogprobs(chunks, logits) if scores_prompt else None
        return cls(logits, sampling_chunks, prompt_logprobs)

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


def sample(
    forward: ForwardOutput,
    sampling: SamplingState,
    grammars: Grammars | None,
    previous_ids: Tensor | None = None,
) -> InFlightStep:
    """Samples a token behind each chunk and behind each of its draft tokens. ``previous_ids``
    int64 are the tokens of the previous step if that is still in flight."""
    chunks: list[ScheduledChunk] = []
    rows: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    top_logprobs: list[int | None] = []
    processed_rows: list[bool] = []
    uncounted_tokens: list[
        tuple[int, int]
    ] = []  # row, and a token before it that penalties must count
    in_flight: list[
        tuple[int, int]
    ] = []  # index in ``uncounted_tokens``, and row of the previous step
    grammar_states: list[tuple[GrammarState, tuple[int, ...]]] = []
    grammar_rows: list[int] = []
    for row, chunk in forward.sampling_chunks:
        s, first, end, draft = chunk.sequence, len(slots), chunk.end, chunk.draft
        if not s.needs_token_at(end):
            continue  # the previous step, which has been committed since, ended it
        chunks.append(chunk)
        params, count = s.request.params, 1 + len(draft)
        rows += range(row, row + count)
        slots += [s.slot] * count
        positions += range(end, end + count)
        top_logprobs += [params.logprobs] * count
        processed_rows += [params.reports_processed_logprobs] * count
        if chunk.input_from_previous_step is not None and previous_ids is not None:
            in_flight.append((len(uncounted_tokens), chunk.input_from_previous_step))
            uncounted_tokens.append((first, PLACEHOLDER))
        if draft:
            uncounted_tokens += [
                (first + i + 1, t) for i in range(len(draft)) for t in draft[: i + 1]
            ]
        if s.grammar is not None:
            grammar_rows += range(first, len(slots))
            grammar_states.append((s.grammar, draft))
    logits = forward.logits
    if len(rows) < len(logits):
        logits = logits[send(torch.tensor(rows, dtype=torch.int64), logits.device)]
    masks = (
        (grammar_rows, grammars.next_token_mask(grammar_states))
        if grammars and grammar_rows
        else None
    )
    device_tokens = None if previous_ids is None or not in_flight else (in_flight, previous_ids)
    arguments = (slots, positions, masks, uncounted_tokens, device_tokens)
    token_ids = sampling.choose(logits, *arguments)
    if any(processed_rows):
        is_processed = send(torch.tensor(processed_rows), logits.device)[:, None]
        logits = torch.where(is_processed, sampling.distribution(logits, *arguments), logits)
    logprobs = LogprobTable(logits, token_ids, top_logprobs)
    return InFlightStep.launch(chunks, token_ids, logprobs, forward.prompt_logprobs)
