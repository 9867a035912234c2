"""Sampling parameters and token counts by slot, so that a step gathers them with one index.

Tables over the vocabulary (counts, bias, bans) are allocated when the first request needs them.

S rows that are sampled from, G of them with a grammar, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.engine import sampler
from nanochat_ray.engine.native import Native
from nanochat_ray.engine.native_sampler import NativeSampler
from nanochat_ray.engine.sampler import Rows
from nanochat_ray.engine.sequence import Sequence
from nanochat_ray.engine.slot_parameters import BAN, BIAS, PENALTY, SlotParameters
from nanochat_ray.machine import send, use_triton


class SamplingState:
    """One row of parameters for each slot."""

    def __init__(
        self, slots: int, vocab_size: int, device: torch.device, native: Native | None = None
    ):
        """With ``native``, which is for a CPU, sampling is in C, else torch's or Triton's."""
        self.vocab_size, self.device, self.slots = vocab_size, device, slots
        # One more row, which is greedy: for padding.
        self._parameters = SlotParameters.zeros(slots + 1, device)
        self._features = self._parameters.features.numpy()
        self._top_k = np.zeros(slots + 1, dtype=np.int64)
        """``top_k`` of slots that use it, else 0; on the host."""
        self._native = None if native is None else NativeSampler(native.library, self._parameters)
        self.plain_sampler = self._make_plain_sampler()
        """What ``choose`` does for slots that ``adjusts`` is false of, without the host: tokens
        int64 ``[R]`` of logits ``[R, V]``, slots and positions int64 ``[R]`` on the device. Slot
        ``slots`` is greedy. None where there is no kernel for it."""

    @property
    def counts_tokens(self) -> bool:
        """Whether a request has had penalties, so that tokens are counted."""
        return self._parameters.counts is not None

    def adjusts(self, slots: SequenceOf[int]) -> bool:
        """Whether a request in these slots changes logits: by penalties, bias or bans."""
        return bool((self._features[list(slots)] & (PENALTY | BIAS | BAN)).any())

    def _make_plain_sampler(self) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
        if not use_triton(self.device):
            return None
        from nanochat_ray.engine import triton_sampler

        if self.vocab_size > triton_sampler.MAX_VOCAB:
            return None
        return partial(triton_sampler.choose_by_slot, self._parameters)

    def admit(self, sequence: Sequence) -> None:
        """Sets the row of the sequence's slot."""
        p, slot, features = sequence.request.params, sequence.slot, 0
        if p.temperature > 0:
            features |= sampler.SAMPLED
            features |= sampler.TOP_K if 0 < p.top_k < self.vocab_size else 0
            if p.top_p < 1:
                features |= sampler.TOP_P | (0 if features & sampler.TOP_K else sampler.NUCLEUS)
            features |= sampler.MIN_P if p.min_p > 0 else 0
        rows = self._parameters
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
            if rows.bias is None:
                rows.bias = self._table(torch.float32)
            values = send(torch.tensor(list(p.logit_bias.values())), self.device)
            rows.bias[slot].zero_().index_copy_(0, self._ids(list(p.logit_bias)), values)
        if p.min_tokens and sequence.stop_token_ids:
            features |= BAN
            if rows.bans is None:
                rows.bans = self._table(torch.bool)
            rows.bans[slot].zero_().index_fill_(0, self._ids(list(sequence.stop_token_ids)), True)
            rows.ban_before[slot].fill_(len(sequence.request.prompt) + p.min_tokens)
        self._features[slot] = features
        if self._native is not None:
            self._native.bind()

    def _admit_penalties(self, sequence: Sequence) -> None:
        p, slot, rows = sequence.request.params, sequence.slot, self._parameters
        if rows.in_text is None or rows.counts is None:
            rows.in_text, rows.counts = self._table(torch.bool), self._table(torch.float32)
        rows.in_text[slot].zero_().index_fill_(0, self._ids(sequence.tokens), True)
        output_ids = self._ids(sequence.tokens[len(sequence.request.prompt) :])
        ones = torch.ones(len(output_ids), device=self.device)
        rows.counts[slot].zero_().index_add_(0, output_ids, ones)
        penalties = torch.tensor((p.repetition_penalty, p.presence_penalty, p.frequency_penalty))
        rows.penalties[slot].copy_(send(penalties, self.device))

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
        if self._native is not None:
            uncounted_pairs = self._uncounted_pairs(uncounted_tokens, device_tokens)
            return self._native.choose(logits, slots, positions, grammar_masks, uncounted_pairs)
        if grammar_masks is None and not self._features[list(slots)].any():
            return sampler.greedy(logits)
        logits, features = self._adjust(
            logits, slots, positions, grammar_masks, uncounted_tokens, device_tokens
        )
        if not features:
            return sampler.greedy(logits)
        positions_S = self._ids(list(positions))
        if self.plain_sampler is not None and features & sampler.SAMPLED:
            return self.plain_sampler(logits, self._ids(list(slots)), positions_S)
        return sampler.choose(logits, self._rows(slots), positions_S, features)

    def distribution(
        self,
        logits: Tensor,
        slots: SequenceOf[int],
        positions: SequenceOf[int],
        grammar_masks: tuple[SequenceOf[int], np.ndarray] | None = None,
        uncounted_tokens: SequenceOf[tuple[int, int]] = (),
        device_tokens: tuple[SequenceOf[tuple[int, int]], Tensor] | None = None,
    ) -> Tensor:
        """Log-weights float32 ``[S, V]`` of what ``choose`` samples from, for equal arguments:
        after grammar, bias, penalties, bans, temperature, min-p, top-k and top-p."""
        logits, features = self._adjust(
            logits, slots, positions, grammar_masks, uncounted_tokens, device_tokens
        )
        return sampler.distribution(logits, self._rows(slots), features)

    def _rows(self, slots: SequenceOf[int]) -> Rows:
        """The sampler's parameters of these slots."""
        slots_S = self._ids(list(slots))
        columns = ("temperature", "top_k", "top_p", "min_p", "seed")
        return Rows(
            **{name: getattr(self._parameters, name)[slots_S] for name in columns},
            widest=int(self._top_k[list(slots)].max(initial=0)),
        )

    def _adjust(
        self,
        logits: Tensor,
        slots: SequenceOf[int],
        positions: SequenceOf[int],
        grammar_masks: tuple[SequenceOf[int], np.ndarray] | None,
        uncounted_tokens: SequenceOf[tuple[int, int]],
        device_tokens: tuple[SequenceOf[tuple[int, int]], Tensor] | None,
    ) -> tuple[Tensor, int]:
        """Logits after grammar, bias, penalties and bans; all features that the rows use."""
        if grammar_masks is not None:
            rows, mask = grammar_masks
            mask_GV = send(torch.from_numpy(mask), self.device)
            logits = sampler.mask_rows(logits, self._ids(list(rows)), mask_GV)
        features = int(np.bitwise_or.reduce(self._features[list(slots)]))
        slots_S, positions_S = self._ids(list(slots)), self._ids(list(positions))
        parameters = self._parameters
        if features & BIAS and parameters.bias is not None:
            logits = logits + self._uses(BIAS, slots) * parameters.bias[slots_S]
        if features & PENALTY:
            uncounted_pairs = self._uncounted_pairs(uncounted_tokens, device_tokens)
            logits = self._penalise(logits, slots, slots_S, uncounted_pairs)
        if features & BAN and parameters.bans is not None:
            is_early = (positions_S < parameters.ban_before[slots_S])[:, None]
            is_early &= self._uses(BAN, slots) > 0
            ban_logits = logits.masked_fill(parameters.bans[slots_S] & is_early, -torch.inf)
            # Where a grammar allows only banned tokens, the grammar wins.
            is_empty = ban_logits.amax(dim=-1, keepdim=True) == -torch.inf
            logits = torch.where(is_empty, logits, ban_logits)
        return logits, features

    def _uncounted_pairs(
        self,
        pairs: SequenceOf[tuple[int, int]],
        device_tokens: tuple[SequenceOf[tuple[int, int]], Tensor] | None,
    ) -> Tensor | None:
        """The pairs int64 ``[A, 2]`` of a row and a token, with the tokens that only the device
        knows."""
        if not pairs:
            return None
        pairs_A2 = self._ids(list(pairs))  # type: ignore[arg-type]
        if device_tokens is not None:
            sampler.insert(pairs_A2[:, 1], *device_tokens)
        return pairs_A2

    def _penalise(
        self,
        logits: Tensor,
        slots: SequenceOf[int],
        slots_S: Tensor,
        uncounted_pairs: Tensor | None,
    ) -> Tensor:
        rows = self._parameters
        assert rows.in_text is not None
        assert rows.counts is not None
        uses = self._uses(PENALTY, slots)
        repetition, presence, frequency = rows.penalties[slots_S].unbind(1)
        in_text, counts = rows.in_text[slots_S], rows.counts[slots_S]
        if uncounted_pairs is not None:
            self._count(in_text, counts, uncounted_pairs)
        penalties = (repetition, presence, frequency)
        return torch.where(uses > 0, sampler.penalise(logits, in_text, counts, *penalties), logits)

    def _uses(self, feature: int, slots: SequenceOf[int]) -> Tensor:
        """float32 ``[S, 1]``: 1 where the row uses the feature."""
        flags = (self._features[list(slots)] & feature) > 0
        return send(torch.from_numpy(flags).float(), self.device)[:, None]

    def count(self, slots: SequenceOf[int], tokens: SequenceOf[int]) -> None:
        """Counts new output tokens of the sequences in ``slots``, injected ones too."""
        pairs = np.array((slots, tokens), dtype=np.int64).T
        pairs = pairs[self._features[pairs[:, 0]] & PENALTY > 0]
        rows = self._parameters
        if len(pairs) and rows.in_text is not None and rows.counts is not None:
            self._count(rows.in_text, rows.counts, send(torch.from_numpy(pairs), self.device))

    def _count(self, in_text: Tensor, counts: Tensor, pairs: Tensor) -> None:
        """Adds ``pairs`` int64 ``[A, 2]`` (row, token) to ``in_text`` and ``counts [R, V]``.
        By flat indices, since ``index_put_`` may wait for a GPU."""
        indices = pairs[:, 0] * self.vocab_size + pairs[:, 1]
        in_text.view(-1).index_fill_(0, indices, True)
        counts.view(-1).index_add_(0, indices, torch.ones(len(indices), device=self.device))
