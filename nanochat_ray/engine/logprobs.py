"""Requested log-probabilities, computed for all rows of a step at once."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from nanochat_ray.engine import sampler
from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.sequence import Sequence
from nanochat_ray.machine import send


class LogprobTable:
    """Log-probabilities of some rows, on the device until they are fetched or read."""

    def __init__(self, logits: Tensor, tokens: Tensor, tops: SequenceOf[int | None]):
        """For float32 ``logits [R, V]`` and int64 ``tokens [R]``: the log-probability of each token
        and of the ``tops`` likeliest ones; None: neither is needed."""
        self._num_rows = len(tops)
        self._requests = [(row, top) for row, top in enumerate(tops) if top is not None]
        self._columns: tuple[Tensor, ...] = ()
        if self._requests:
            if len(self._requests) < len(logits):
                rows = send(torch.tensor([row for row, _ in self._requests]), logits.device)
                logits, tokens = logits[rows], tokens[rows]
            top = min(max(top for _, top in self._requests), logits.size(-1))
            self._columns = sampler.log_probabilities(logits, tokens, top)

    def fetch(self) -> None:
        """Starts the copy to the CPU, to be read when the device has done it."""
        self._columns = tuple(column.to("cpu", non_blocking=True) for column in self._columns)

    def read(self) -> list[TokenLogprob | None]:
        """For each of the R rows, None where not needed; an empty list if no row needs any."""
        if not self._requests:
            return []
        logprobs: list[TokenLogprob | None] = [None] * self._num_rows
        own, ids, values = (column.tolist() for column in self._columns)
        for i, (row, n) in enumerate(self._requests):
            top = list(zip(ids[i][:n], values[i][:n], strict=True)) if n else []
            logprobs[row] = TokenLogprob(logprob=own[i], top=top)
        return logprobs


class PromptLogprobs:
    """Log-probabilities of prompt tokens that a step computes."""

    def __init__(self, chunks: SequenceOf[ScheduledChunk], logits: Tensor):
        """``logits [R, V]`` are those of the chunks."""
        tokens = [0] * len(logits)
        tops: list[int | None] = [None] * len(logits)
        self._positions: list[tuple[Sequence, int]] = []
        first = 0
        for chunk in chunks:
            s, prompt = chunk.sequence, chunk.sequence.request.prompt
            if chunk.prompt_logprobs:
                # The logits of a token are those of the token behind it.
                offset = chunk.end - chunk.num_logits
                for position in range(offset + 1, min(chunk.end + 1, len(prompt))):
                    row = first + position - 1 - offset
                    tokens[row] = prompt[position]
                    tops[row] = s.request.params.prompt_logprobs or 0
                    self._positions.append((s, position))
            first += chunk.num_logits
        self.table = LogprobTable(logits, send(torch.tensor(tokens), logits.device), tops)

    def store(self) -> None:
        """Adds them to the ``prompt_logprobs`` of the sequences, unless they were there before a
        preemption."""
        logprobs = [logprob for logprob in self.table.read() if logprob is not None]
        for (s, position), logprob in zip(self._positions, logprobs, strict=True):
            if s.prompt_logprobs is not None and s.next_scored_position == position:
                s.prompt_logprobs.append(logprob)
