"""Log-probabilities that requests ask for, computed for all of a step's rows at once."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from nanochat_ray.engine import sampler
from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.engine.scheduler import Chunk, Sequence
from nanochat_ray.machine import send


class ScoreTable:
    """Those of some rows, on the device until they are fetched or read."""

    def __init__(self, logits: Tensor, tokens: Tensor, tops: SequenceOf[int | None]):
        """Of float32 ``logits [R, V]`` and int64 ``tokens [R]``: each token, and as many likeliest
        ones as ``tops`` says; None asks for nothing."""
        self._rows = len(tops)
        self._asked = [(row, top) for row, top in enumerate(tops) if top is not None]
        self._columns: tuple[Tensor, ...] = ()
        if self._asked:
            if len(self._asked) < len(logits):
                at = send(torch.tensor([row for row, _ in self._asked]), logits.device)
                logits, tokens = logits[at], tokens[at]
            top = min(max(top for _, top in self._asked), logits.size(-1))
            self._columns = sampler.log_probabilities(logits, tokens, top)

    def fetch(self) -> None:
        """Has it sent to the CPU; to be read once the device is that far."""
        self._columns = tuple(column.to("cpu", non_blocking=True) for column in self._columns)

    def read(self) -> list[TokenLogprob | None]:
        """For each of the R rows: None where nobody asked; an empty list if nobody did at all."""
        if not self._asked:
            return []
        found: list[TokenLogprob | None] = [None] * self._rows
        own, ids, values = (column.tolist() for column in self._columns)
        for i, (row, n) in enumerate(self._asked):
            top = list(zip(ids[i][:n], values[i][:n], strict=True))
            found[row] = TokenLogprob(logprob=own[i], top=top)
        return found


class PromptScores:
    """What a step tells of prompts' tokens."""

    def __init__(self, chunks: SequenceOf[Chunk], logits: Tensor):
        """``logits [R, V]`` are those of the chunks."""
        tokens = [0] * len(logits)
        tops: list[int | None] = [None] * len(logits)
        self._places: list[tuple[Sequence, int]] = []
        row = 0
        for chunk in chunks:
            s, prompt = chunk.sequence, chunk.sequence.request.prompt
            if chunk.scores:
                # The row of each token tells of the one behind it.
                for place in range(
                    chunk.start + 1, min(chunk.start + chunk.count + 1, len(prompt))
                ):
                    at = row + place - 1 - chunk.start
                    tokens[at], tops[at] = prompt[place], s.request.params.prompt_logprobs or 0
                    self._places.append((s, place))
            row += chunk.rows
        self.table = ScoreTable(logits, send(torch.tensor(tokens), logits.device), tops)

    def tell(self) -> None:
        """Adds them to the ``prompt_scores`` of sequences, unless they are known from before a
        preemption."""
        found = [score for score in self.table.read() if score is not None]
        for (s, place), score in zip(self._places, found, strict=True):
            if s.prompt_scores is not None and len(s.prompt_scores) == place - 1:
                s.prompt_scores.append(score)
