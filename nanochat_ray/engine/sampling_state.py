"""Sampling parameters and token counts by slot, so that a step gathers them with one index.

Tables over the vocabulary (counts, bias, bans) are allocated when the first request needs them.

S rows that are sampled from, G of them with a grammar, V tokens of the vocabulary.
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
        self._in_text: Tensor | None = None
        self._counts: Tensor | None = None
        self._bias: Tensor | None = None
        self._bans: Tensor | None = None

    def admit(self, sequence: Sequence) -> None:
        """Sets the row of the sequence's slot."""
        p, slot, features = sequence.request.params, sequence.slot, 0
        if p.temperature > 0:
            features |= sampler.SAMPLED
            features |= sampler.TOP_K if 0 < p.top_k < self.vocab_size else 0
            if p.top_p < 1:
                features |= sampler.TOP_P | (0 if features & sampler.TOP_K else sampler.NUCLEUS)
            features |= sampler.MIN_P if p.min_p > 0 else 0
        rows = self._rows
        self._top_k[slot] = p.top_k if features & sampler.TOP_K else 0
        # ``fill_``, since ``tensor[slot] = number`` waits for the GPU.
        hot = min(max(p.temperature, sampler.MIN_TEMPERATURE), sampler.MAX_TEMPERATURE)
        hot = hot if p.temperature > 0 else 0.0
        rows.temperature[slot].fill_(hot)
        rows.top_k[slot].fill_(p.top_k)
        rows.top_p[slot].fill_(p.top_p)
        rows.min_p[slot].fill_(p.min_p)
        rows.seed[slot].fill_(sampler.to_int64(sequence.seed))
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
        if self._in_text is None or self._counts is None:
            self._in_text, self._counts = self._table(torch.bool), self._table(torch.float32)
        self._in_text[slot].zero_().index_fill_(0, self._ids(sequence.tokens), True)
        output_ids = self._ids(sequence.tokens[len(sequence.request.prompt) :])
        ones = torch.ones(len(output_ids), device=self.device)
        self._counts[slot].zero_().index_add_(0, output_ids, ones)
        penalties = torch.tensor((p.repetition_penalty, p.presence_penalty, p.frequency_penalty))
        self._penalties[slot].copy_(send(penalties, self.device))

    def _table(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros((self.slots, self.vocab_size), dtype=dtype, device=self.device)

    def _ids(self, tokens: list[int]) -> Tensor:
        return send(torch.tensor(tokens, dtype=torch.int64), self.device)

    def choose(
        self,
        logits: Tensor,
        slots: SequenceOf[int],
        positions: SequenceOf[int],
        grammar_masks: tuple[SequenceOf[int], np.ndarray] | None = None,
        uncounted_tokens: SequenceOf[tuple[int, int]] = (),
        device_tokens: tuple[SequenceOf[tuple[int, int]], Tensor] | None = None,
    ) -> Tensor:
        """Tokens int64 ``[S]`` at ``positions``, from ``logits [S, V]`` of the ``slots``.

        ``grammar_masks``: the rows with a grammar, and the tokens that it allows, bool ``[G, V]``.
        ``uncounted_tokens``: pairs of a row and a token that penalties must count beside those that
        ``count`` was called with. ``device_tokens``: what ``sampler.insert`` copies over the tokens
        of those pairs.
        """
        if grammar_masks is not None:
            rows, mask = grammar_masks
            mask_GV = send(torch.from_numpy(mask), self.device)
            logits = sampler.mask_rows(logits, self._ids(list(rows)), mask_GV)
        features = 0
        for slot in slots:
            features |= self._features[slot]
        if not features:
            return sampler.greedy(logits)
        slots_S, positions_S = self._ids(list(slots)), self._ids(list(positions))
        if features & BIAS and self._bias is not None:
            logits = logits + self._uses(BIAS, slots) * self._bias[slots_S]
        if features & PENALTY and self._in_text is not None and self._counts is not None:
            logits = self._penalise(logits, slots, slots_S, uncounted_tokens, device_tokens)
        if features & BAN and self._bans is not None:
            is_early = (positions_S < self._ban_before[slots_S])[:, None]
            is_early &= self._uses(BAN, slots) > 0
            ban_logits = logits.masked_fill(self._bans[slots_S] & is_early, -torch.inf)
            # Where a grammar allows only banned tokens, the grammar wins.
            is_empty = ban_logits.amax(dim=-1, keepdim=True) == -torch.inf
            logits = torch.where(is_empty, logits, ban_logits)
        columns = ("temperature", "top_k", "top_p", "min_p", "seed")
        step = Rows(
            **{name: getattr(self._rows, name)[slots_S] for name in columns},
            widest=max(self._top_k[slot] for slot in slots),
        )
        if use_triton(self.device) and features & sampler.SAMPLED:
            from nanochat_ray.engine import triton_sampler

            if logits.size(1) <= triton_sampler.MAX_VOCAB:
                return triton_sampler.choose(logits, step, positions_S)
        return sampler.choose(logits, step, positions_S, features)

    def _penalise(
        self,
        logits: Tensor,
        slots: SequenceOf[int],
        slots_S: Tensor,
        uncounted_tokens: SequenceOf[tuple[int, int]],
        device_tokens: tuple[SequenceOf[tuple[int, int]], Tensor] | None,
    ) -> Tensor:
        assert self._in_text is not None
        assert self._counts is not None
        uses = self._uses(PENALTY, slots)
        repetition, presence, frequency = self._penalties[slots_S].unbind(1)
        in_text, counts = self._in_text[slots_S], self._counts[slots_S]
        if uncounted_tokens:
            pairs = self._ids(list(uncounted_tokens))  # type: ignore[arg-type]
            if device_tokens is not None:
                sampler.insert(pairs[:, 1], *device_tokens)
            self._count(in_text, counts, pairs)
        penalties = (repetition, presence, frequency)
        return torch.where(uses > 0, sampler.penalise(logits, in_text, counts, *penalties), logits)

    def _uses(self, feature: int, slots: SequenceOf[int]) -> Tensor:
        """float32 ``[S, 1]``: 1 where the row uses the feature."""
        flags = [float(bool(self._features[slot] & feature)) for slot in slots]
        return send(torch.tensor(flags), self.device)[:, None]

    def count(self, slots: SequenceOf[int], tokens: SequenceOf[int]) -> None:
        """Counts new output tokens of the sequences in ``slots``, injected ones too."""
        pairs = [(s, t) for s, t in zip(slots, tokens, strict=True) if self._features[s] & PENALTY]
        if not pairs or self._in_text is None or self._counts is None:
            return
        self._count(self._in_text, self._counts, self._ids(pairs))  # type: ignore[arg-type]

    def _count(self, in_text: Tensor, counts: Tensor, pairs: Tensor) -> None:
        """Adds ``pairs`` int64 ``[A, 2]`` (row, token) to ``in_text`` and ``counts [R, V]``.
        By flat indices, since ``index_put_`` may wait for a GPU."""
        indices = pairs[:, 0] * self.vocab_size + pairs[:, 1]
        in_text.view(-1).index_fill_(0, indices, True)
        counts.view(-1).index_add_(0, indices, torch.ones(len(indices), device=self.device))
