"""A step that has been launched, and whose tokens may be on the device alone yet.

S rows that are sampled from, V tokens of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_ray.engine.grammar import Grammars, GrammarState
from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.engine.sampling_state import SamplingState
from nanochat_ray.engine.scheduler import UNKNOWN, Chunk
from nanochat_ray.engine.scores import PromptScores, ScoreTable
from nanochat_ray.machine import send


class Launched:
    """What comes of a step."""

    def __init__(
        self, chunks: list[Chunk], chosen: Tensor, scores: ScoreTable, prompts: PromptScores | None
    ):
        """The chunks that sample, the tokens ``chosen [S]`` and their scores: a row for each chunk
        and one more for each guess of its draft."""
        self.chunks, self.chosen, self._scores, self._prompts = chunks, chosen, scores, prompts
        self._told, self._event = chosen, None
        if chosen.is_cuda:
            self._told = chosen.to("cpu", non_blocking=True)  # to pinned memory
            scores.fetch()
            if prompts is not None:
                prompts.table.fetch()
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(chosen.device))

    def results(self) -> tuple[list[int], list[TokenLogprob | None]]:
        """The tokens, and scores as ``ScoreTable.read``. Waits until the step is over, also where
        nothing was chosen: no more than one may wait for the device behind it."""
        if self._event is not None:
            self._event.synchronize()
        if self._prompts is not None:
            self._prompts.tell()
        return self._told.tolist(), self._scores.read()

    @property
    def leads(self) -> bool:
        """Whether the next step can be planned before the tokens are known: each sequence goes on
        by one, whatever it is."""
        return not any(chunk.draft for chunk in self.chunks)

    def assume(self) -> Tensor:
        """Gives each sequence the token that was chosen for it, without knowing it. Returns what
        was chosen."""
        for row, chunk in enumerate(self.chunks):
            if chunk.samples:
                chunk.sequence.tokens.append(UNKNOWN)
                chunk.sequence.late = row
        # A row that failed has no token; the next step may take any, since it comes to nothing.
        return self.chosen.clamp_min(0)

    def forget(self) -> None:
        """Takes back what ``assume`` gave."""
        for chunk in self.chunks:
            if chunk.sequence.late >= 0:
                chunk.sequence.tokens.pop()
                chunk.sequence.late = -1


@dataclass(frozen=True)
class Ran:
    """A step whose tokens are still to be chosen."""

    logits: Tensor
    """float32 ``[R, V]``"""
    sampling: list[tuple[int, Chunk]]
    """The chunks that sample, with the row of their last token, behind which their guesses are."""
    prompts: PromptScores | None = None

    @property
    def waits(self) -> bool:
        """Whether the tokens of the step before must be known first: what a grammar allows hangs
        on them."""
        return any(chunk.sequence.grammar is not None for _, chunk in self.sampling)


def launch(
    ran: Ran, sampling: SamplingState, grammars: Grammars | None, flown: Tensor | None = None
) -> Launched:
    """Chooses a token after each chunk that still samples, and one after each of its guesses, which
    holds if those before it do. ``flown`` int64 are the tokens that the last step chose, while
    sequences are ``late``."""
    chunks: list[Chunk] = []
    rows: list[int] = []
    slots: list[int] = []
    positions: list[int] = []
    ahead: list[tuple[int, int]] = []
    unknown: list[tuple[int, int]] = []
    states: list[tuple[GrammarState, tuple[int, ...]]] = []
    masked: list[int] = []
    tops: list[int | None] = []
    for row, chunk in ran.sampling:
        if not chunk.samples:
            continue  # the step before, once known, left nothing of it
        s, first, count = chunk.sequence, len(slots), 1 + len(chunk.draft)
        chunks.append(chunk)
        rows += range(row, row + count)
        slots += [s.slot] * count
        tops += [s.request.params.logprobs] * count
        positions += range(len(s.tokens), len(s.tokens) + count)
        if s.late >= 0:
            unknown.append((len(ahead), s.late))
            ahead.append((first, UNKNOWN))
        ahead += [(first + i, t) for i in range(1, count) for t in chunk.draft[:i]]
        if s.grammar is not None:
            masked += range(first, first + count)
            states.append((s.grammar, chunk.draft))
    logits = ran.logits
    if len(rows) < len(logits):
        logits = logits[send(torch.tensor(rows, dtype=torch.int64), logits.device)]
    allowed = (masked, grammars.allowed(states)) if grammars and states else None
    late = None if flown is None or not unknown else (unknown, flown)
    chosen = sampling.choose(logits, slots, positions, allowed, ahead, late)
    return Launched(chunks, chosen, ScoreTable(logits, chosen, tops), ran.prompts)
