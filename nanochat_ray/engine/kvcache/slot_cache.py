"""Keys and values by slot, and attention over them.

Each running sequence has one slot: contiguous memory for ``max_model_len`` tokens. On a CPU this
decodes fastest, since a batch of neighbouring slots is one view and nothing is gathered.

The forward is flat: N tokens, decodes first, then the prompt chunks. With attention in C
(``native``) a token's bits do not depend on the tokens beside it, and are the same whether it runs
as a decode or in a prompt. With torch's they are near (see ``padding``).

Legend: N tokens, H heads, Hkv key/value heads, G = H / Hkv, D head size, L length of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.kvcache.kv_cache import KVCache
from nanochat_ray.engine.kvcache.lazy_memory import LazyMemory
from nanochat_ray.engine.kvcache.padding import padded_length, padded_queries, slot_length
from nanochat_ray.engine.model import InferenceModel
from nanochat_ray.engine.native import Native
from nanochat_ray.engine.step_plan import OPTIONS, StepPlan
from nanochat_ray.machine import send
from nanochat_ray.model.config import ModelConfig

CALL_BYTES = 150_000
"""Reading as much from memory takes about as long as one more call of attention (15 µs)."""


@dataclass(frozen=True)
class _Run:
    """Decodes ``[first, last)`` of a step, whose slots are neighbours from ``slot`` on."""

    first: int
    last: int
    slot: int
    length: int


class SlotCache(KVCache):
    """Slot s has positions ``[0, max_model_len)`` of ``keys[:, s]`` and ``values[:, s]``, both
    ``[layers, slots, Hkv, length, D]`` and halves of ``keys_values``. Their addresses stay."""

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        min_num_tokens: int = 1,
        native: Native | None = None,
        huge_pages: bool = True,
    ):
        """``min_num_tokens``: the least number of tokens of a forward. ``native`` was compiled for
        the model's sizes. ``huge_pages``: see ``LazyMemory``."""
        length = slot_length(max_model_len, native is not None)
        shape = (2, config.n_layer, num_slots, config.n_kv_head, length, config.head_dim)
        # Zeros, not garbage: a masked value is multiplied by 0, and 0 * nan is nan. On a CPU only
        # what is written takes memory.
        self._memory = LazyMemory(shape, dtype, huge_pages) if device.type == "cpu" else None
        self.keys_values = (
            self._memory.tensor if self._memory else torch.zeros(shape, dtype=dtype, device=device)
        )
        self.keys, self.values = self.keys_values
        self.positions = torch.zeros(0, dtype=torch.int64, device=device)
        self._columns = torch.arange(length, device=device)
        self._group = config.n_head // config.n_kv_head
        self._bytes_per_token = 2 * config.n_kv_head * config.head_dim * dtype.itemsize
        self._native, self._min_num_tokens = native, min_num_tokens
        self._num_decodes = 0
        self._runs: list[_Run] = []
        self._prefills: list[Span] = []
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._slot_mapping = self.slots_and_positions = self.tile_starts = self.positions

    @property
    def nbytes(self) -> int:
        return self.keys_values.nbytes

    def step_plan(self, model: InferenceModel) -> StepPlan | None:
        if self._native is None or model.config.options_beyond(OPTIONS):
            return None
        return StepPlan(model, self, self._native)

    def release_slot(self, slot: int) -> None:
        """Gives the memory of a slot back to the system."""
        if self._memory is None:
            return
        num_slots, num_bytes = self.keys.size(1), self.keys[0, 0].nbytes
        for layer in range(2 * self.keys.size(0)):
            self._memory.release((layer * num_slots + slot) * num_bytes, num_bytes)

    def copy_tokens(self, copies_P3: np.ndarray) -> None:
        """Copies keys and values between slots: of each row int64 ``(source, target, position)``
        those at the position."""
        sources, targets, positions = torch.from_numpy(copies_P3).unbind(1)
        self.keys_values[:, :, targets, :, positions] = self.keys_values[
            :, :, sources, :, positions
        ]

    def prepare(self, spans: ArrayLike) -> int:
        spans_S4 = np.asarray(spans, dtype=np.int64).reshape(-1, 4)
        slots, starts, counts, is_decode = spans_S4.T
        slots = np.repeat(slots, counts)
        total = int(counts.sum())
        offset = np.arange(total) - np.repeat(counts.cumsum() - counts, counts)
        positions = np.repeat(starts, counts) + offset
        num_tokens = max(total, self._min_num_tokens)
        positions_N = np.zeros(num_tokens, dtype=np.int64)
        positions_N[:total] = positions
        device = self.keys.device
        self.positions = send(torch.from_numpy(positions_N), device)
        if self._native is not None:
            self.slots_and_positions = torch.from_numpy(np.stack([slots, positions]))
            self.tile_starts = self._native.tile_starts(slots, positions)
            return num_tokens
        self._num_decodes = int(is_decode.sum())
        rows = [Span(slot, start, n, bool(decode)) for slot, start, n, decode in spans_S4.tolist()]
        self._prefills = rows[self._num_decodes :]
        self._masks.clear()
        heads, length = self.keys.shape[2:4]
        mapping = (slots[:, None] * heads + np.arange(heads)) * length + positions[:, None]
        self._slot_mapping = send(torch.from_numpy(mapping.reshape(-1)), device)
        self._runs = self._find_runs(rows[: self._num_decodes])
        return num_tokens

    def _find_runs(self, decodes: Sequence[Span]) -> list[_Run]:
        runs: list[_Run] = []
        total = 0  # sum of the lengths that the last run's decodes need
        for i, span in enumerate(decodes):
            length = padded_length(span.start + 1, self._group)
            if runs and span.slot == runs[-1].slot + i - runs[-1].first:
                last = runs[-1]
                longest = max(last.length, length)
                waste = longest * (i + 1 - last.first) - total - length
                if waste * self._bytes_per_token <= CALL_BYTES:
                    runs[-1] = _Run(last.first, i + 1, last.slot, longest)
                    total += length
                    continue
            runs.append(_Run(i, i + 1, span.slot, length))
            total = length
        return runs

    def _mask(self, first: int, last: int, length: int, window: int) -> Tensor:
        """``[last - first, length]`` of 0 where a token attends to a key, else -inf.

        Built once for all layers of a step that have the same window.
        """
        mask = self._masks.get((first, window))
        if mask is None:
            positions = self.positions[first:last, None]
            columns = self._columns[:length]
            invisible = columns > positions
            if window >= 0:
                invisible |= columns < positions - window
            mask = torch.zeros(invisible.shape, dtype=self.keys.dtype, device=invisible.device)
            mask.masked_fill_(invisible, -torch.inf)
            self._masks[(first, window)] = mask
        return mask

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """``q [N, H, D]``, ``k`` and ``v [N, Hkv, D]`` → ``[N, H, D]``."""
        N, H, D = q.shape
        keys, values = self.keys[layer], self.values[layer]  # [slots, Hkv, max_model_len, D]
        if self._native is not None:
            step = (self.slots_and_positions, self.tile_starts)
            return self._native.attention(q, k, v, keys, values, *step, window)
        Hkv, first = keys.size(1), self._num_decodes
        q_NhgD = q.view(N, Hkv, H // Hkv, D)
        count, mapping = self._slot_mapping.size(0), self._slot_mapping
        keys.view(-1, D).index_copy_(0, mapping, k.reshape(-1, D)[:count])
        values.view(-1, D).index_copy_(0, mapping, v.reshape(-1, D)[:count])
        y_NhgD = q.new_empty(q_NhgD.shape)
        for run in self._runs:
            y_NhgD[run.first : run.last] = self._decode(run, q_NhgD, keys, values, window)
        for span in self._prefills:
            pair = keys[span.slot], values[span.slot]
            last = first + span.num_tokens
            y_NhgD[first:last] = self._prefill(span, first, q_NhgD, *pair, window)
            first = last
        if first < N:
            y_NhgD[first:] = 0
        return y_NhgD.view(N, H, D)

    def _decode(
        self, run: _Run, q_NhgD: Tensor, keys: Tensor, values: Tensor, window: int
    ) -> Tensor:
        """``[n, Hkv, G, D]`` for the n decodes of a run."""
        mask = self._mask(run.first, run.last, run.length, window)
        slots = slice(run.slot, run.slot + run.last - run.first)
        return F.scaled_dot_product_attention(
            q_NhgD[run.first : run.last],
            keys[slots, :, : run.length],
            values[slots, :, : run.length],
            attn_mask=mask[:, None, None],
        )

    def _prefill(
        self, span: Span, first: int, q_NhgD: Tensor, keys: Tensor, values: Tensor, window: int
    ) -> Tensor:
        """``[T, Hkv, G, D]`` for the T tokens of a prompt chunk, which start at row ``first``."""
        T, (_, Hkv, G, D) = span.num_tokens, q_NhgD.shape
        length = padded_length(span.start + T, 2)
        mask = self._mask(first, first + T, length, window)
        q_hgTD = q_NhgD[first : first + T].permute(1, 2, 0, 3)
        q_hQD, Q = q_hgTD.reshape(Hkv, G * T, D), G * T
        if G > 1:
            mask = mask.repeat(G, 1)
        if short := padded_queries(Q) - Q:
            q_hQD, mask = F.pad(q_hQD, (0, 0, 0, short)), F.pad(mask, (0, 0, 0, short))
        y_hQD = F.scaled_dot_product_attention(
            q_hQD[None], keys[None, :, :length], values[None, :, :length], attn_mask=mask
        )[0, :, :Q]
        return y_hQD.view(Hkv, G, T, D).permute(2, 0, 1, 3)
