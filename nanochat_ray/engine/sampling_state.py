"""Sampling parameters and token counts by slot, so that a step gathers them with one index.

What a feature needs per token of the vocabulary (counts, bias, bans) is allocated when the first
request uses it.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.engine import sampler
from nanochat_ray.engine.sampler import Rows
from nanochat_ray.engine.sequence import Sequence
from nanochat_ray.machine import send, use_triton

PENALTY, BIAS, BAN = 32, 64, 128
"""Features beyond those of the sampler."""


class SamplingState:
    """One row of parameters for each slot."""

    def __init__(self, slots: int, vocab_size: int, device: torch.device):
        self.vocab_size, self.device, self.slots = vocab_size, device, slots

        def column(dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, dtype=dtype, device=device)

        self._rows = Rows(
            temperature=column(torch.float32),
            top_k=column(torch.int64),
            top_p=column(torch.float64),
            min_p=column(torch.float32),
            seed=column(torch.int64),
            widest=0,
        )
        self._top_k = [0] * slots
        # repetition, presence, frequency
        self._penalties = torch.zeros((slots, 3), device=device)
        self._ban_before = column(torch.int64)
        self._features = [0] * slots
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None
        self._bias: Tensor | None = None
        self._bans: Tensor | None = None

    def admit(self, sequence: Sequence) -> None:
        """Fills the row of the sequence's slot."""
        p, slot, features = sequence.request.params, sequence.slot, 0
        if p.temperature > 0:
            features |= sampler.SAMPLED
            features |= sampler.TOP_K if 0 < p.top_k < self.vocab_size else 0
            if p.top_p < 1:
                features |= sampler.TOP_P | (0 if features & sampler.TOP_K else sampler.NUCLEUS)
            features |= sampler.MIN_P if p.min_p > 0 else 0
        rows = self._rows
        self._top_k[slot] = p.top_k if features & sampler.TOP_K else 0
        # To assign a number to a place of a GPU's tensor would be to wait for the GPU.
        hot = min(max(p.temperature, sampler.MIN_TEMPERATURE), sampler.MAX_TEMPERATURE)
        hot = hot if p.temperature > 0 else 0.0
        rows.temperature[slot].fill_(hot)
        rows.top_k[slot].fill_(p.top_k)
        rows.top_p[slot].fill_(p.top_p)
        rows.min_p[slot].fill_(p.min_p)
        rows.seed[slot].fill_(sampler.signed(sequence.seed))
        if p.repetition_penalty != 1 or p.presence_penalty or p.frequency_penalty:
            features |= PENALTY
            self._admit_penalties(sequence)
        if p.logit_bias:
            features |= BIAS
            if self._bias is None:
                self._bias = self._table(torch.float32)
            values = send(torch.tensor(list(p.logit_bias.values())), self.device)
            self._bias[slot].zero_().index_copy_(0, self._ids(list(p.logit_bias)), values)
        if p.min_tokens and sequence.stop_token_ids:
            features |= BAN
            if self._bans is None:
                self._bans = self._table(torch.bool)
            self._bans[slot].zero_().index_fill_(0, self._ids(list(sequence.stop_token_ids)), True)
            self._ban_before[slot].fill_(len(sequence.request.prompt) + p.min_tokens)
        self._features[slot] = features

    def _admit_penalties(self, sequence: Sequence) -> None:
        p, slot = sequence.request.params, sequence.slot
        if self._seen is None or self._counts is None:
            self._seen, self._counts = self._table(torch.bool), self._table(torch.float32)
        self._seen[slot].zero_().index_fill_(0, self._ids(sequence.tokens), True)
        answer = self._ids(sequence.tokens[len(sequence.request.prompt) :])
        ones = torch.ones(len(answer), device=self.device)
        self._counts[slot].zero_().index_add_(0, answer, ones)
        three = torch.tensor((p.repetition_penalty, p.presence_penalty, p.frequency_penalty))
        self._penalties[slot].copy_(send(three, self.device))

    def _table(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros((self.slots, self.vocab_size), dtype=dtype, device=self.device)

    def _ids(self, tokens: list[int]) -> Tensor:
        return send(torch.tensor(tokens, dtype=torch.int64), self.device)

    def choose(
        self,
        logits: Tensor,
        slots: SequenceOf[int],
        positions: SequenceOf[int],
        allowed: tuple[SequenceOf[int], np.ndarray] | None = None,
        ahead: SequenceOf[tuple[int, int]] = (),
        late: tuple[SequenceOf[tuple[int, int]], Tensor] | None = None,
    ) -> Tensor:
        """Tokens int64 ``[S]`` for ``logits [S, V]`` of the sequences in ``slots``, which will
        stand at ``positions``. ``allowed`` holds the rows that follow a grammar and what they
        allow, bool ``[G, V]``; ``ahead`` pairs of a row and a token that it takes to be in the
        answer beside those that were counted; ``late`` what ``sampler.insert`` puts there of tokens
        that are on the device alone."""
        if allowed is not None:
            marked = send(torch.from_numpy(allowed[1]), self.device)
            logits = sampler.allow(logits, self._ids(list(allowed[0])), marked)
        features = 0
        for slot in slots:
            features |= self._features[slot]
        if not features:
            return sampler.greedy(logits)
        at, where = self._ids(list(slots)), self._ids(list(positions))
        if features & BIAS and self._bias is not None:
            logits = logits + self._used(BIAS, slots) * self._bias[at]
        if features & PENALTY and self._seen is not None and self._counts is not None:
            use = self._used(PENALTY, slots)
            repetition, presence, frequency = self._penalties[at].unbind(1)
            seen, counts = self._seen[at], self._counts[at]
            if ahead:
                pairs = self._ids(list(ahead))  # type: ignore[arg-type]
                if late is not None:
                    sampler.insert(pairs[:, 1], *late)
                self._note(seen, counts, pairs)
            changed = sampler.penalise(logits, seen, counts, repetition, presence, frequency)
            logits = torch.where(use > 0, changed, logits)
        if features & BAN and self._bans is not None:
            early = (where < self._ban_before[at])[:, None] & (self._used(BAN, slots) > 0)
            banned = logits.masked_fill(self._bans[at] & early, -torch.inf)
            # Where a grammar allows only what is banned, the grammar has its way.
            stuck = banned.amax(dim=-1, keepdim=True) == -torch.inf
            logits = torch.where(stuck, logits, banned)
        columns = ("temperature", "top_k", "top_p", "min_p", "seed")
        rows = Rows(
            **{name: getattr(self._rows, name)[at] for name in columns},
            widest=max(self._top_k[slot] for slot in slots),
        )
        if use_triton(self.device) and features & sampler.SAMPLED:
            from nanochat_ray.engine import triton_sampler

            if logits.size(1) <= triton_sampler.MAX_VOCAB:
                return triton_sampler.choose(logits, rows, where)
        return sampler.choose(logits, rows, where, features)

    def _used(self, feature: int, slots: SequenceOf[int]) -> Tensor:
        """float32 ``[S, 1]``: 1 where the row uses the feature."""
        used = [float(bool(self._features[slot] & feature)) for slot in slots]
        return send(torch.tensor(used), self.device)[:, None]

    def count(self, slots: SequenceOf[int], tokens: SequenceOf[int]) -> None:
        """Notes new tokens of the answers in ``slots``, forced ones too."""
        pairs = [(s, t) for s, t in zip(slots, tokens, strict=True) if self._features[s] & PENALTY]
        if not pairs or self._seen is None or self._counts is None:
            return
        self._note(self._seen, self._counts, self._ids(pairs))  # type: ignore[arg-type]

    def _note(self, seen: Tensor, counts: Tensor, pairs: Tensor) -> None:
        """Notes ``pairs`` int64 ``[A, 2]`` of a row and a token in ``seen`` and ``counts [R, V]``.
        By their places in memory: ``index_put_`` may wait for a GPU."""
        places = pairs[:, 0] * self.vocab_size + pairs[:, 1]
        seen.view(-1).index_fill_(0, places, True)
        counts.view(-1).index_add_(0, places, torch.ones(len(places), device=self.device))
