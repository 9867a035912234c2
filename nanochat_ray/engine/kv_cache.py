"""Keys and values by slot, and attention over them.

Each running sequence has one slot: contiguous memory for ``max_model_len`` tokens. On a CPU that
decodes fastest, since a batch of neighbouring slots is one view: nothing is gathered.

The forward is flat: N rows of one token each, decodes first, then the prompt chunks. With attention
in C (``native``) a row's bits do not depend on the rows beside it, and are the same whether it is a
decode or a prompt's. With torch's they are near: the order of sums is MKL's, which depends on the
CPU. On Intel's, as far as trials show, two things keep it the same:

- keys beyond a row's own are masked, and a masked tail of zeros changes no bit as long as the
  length is a multiple of 16 and, with several queries to a head, not between 256 and 512 modulo
  512, where MKL would split the sum over keys at another place (``padded_length``);
- queries of a prompt chunk are at least 8 at a time, since with fewer MKL takes another kernel;
  torch takes them by the 32, so what is left over counts (``padded_queries``).

Legend: N rows, H heads, Hkv key/value heads, G = H / Hkv, D head size, L length of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.config import ModelConfig
from nanochat_ray.engine.blocks import BLOCK
from nanochat_ray.engine.native import Native
from nanochat_ray.machine import send, zeros

CALL_BYTES = 150_000
"""Reading as much from memory takes about as long as one more call of attention (15 µs)."""


def padded_length(n: int, queries: int) -> int:
    """Length of keys to attend to, of which ``n`` count: see above."""
    n = -(-n // 16) * 16
    rest = n % 512
    return n if queries == 1 or rest <= 256 else n - rest + 512


def slot_length(max_model_len: int, native: bool) -> int:
    """Tokens that a slot has room for, so that attention to ``max_model_len`` finds its padding."""
    return padded_length(max_model_len, 1 if native else 2)


def padded_queries(n: int) -> int:
    """Number of queries to run ``n`` as: see above."""
    return n + max(0, 8 - n % 32) if n % 32 else n


@dataclass(frozen=True)
class Span:
    """Tokens ``[start, start + count)`` of the sequence in ``slot``."""

    slot: int
    start: int
    count: int
    decode: bool


@dataclass(frozen=True)
class _Run:
    """Decoding rows ``[first, last)`` that sit in neighbouring slots from ``slot`` on."""

    first: int
    last: int
    slot: int
    length: int


class SlotCache:
    """Implements ``AttentionContext``. Call ``begin`` before each forward."""

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        min_rows: int = 1,
        native: Native | None = None,
    ):
        """``min_rows`` is the least number of rows of a forward; ``native`` has the model's
        sizes."""
        length = slot_length(max_model_len, native is not None)
        shape = (config.n_layer, slots, config.n_kv_head, length, config.head_dim)
        # Zeros, not garbage: a masked value is multiplied by 0, and 0 * nan is nan.
        self.keys = zeros(shape, dtype, device)
        self.values = zeros(shape, dtype, device)
        self.positions = torch.zeros((0, 1), dtype=torch.int64, device=device)
        self.end = max_model_len
        self._columns = torch.arange(length, device=device)
        self._group = config.n_head // config.n_kv_head
        self._row_bytes = 2 * config.n_kv_head * config.head_dim * dtype.itemsize
        self._native, self._min_rows, self._decodes = native, min_rows, 0
        self._runs: list[_Run] = []
        self._prefills: list[Span] = []
        self._masks: dict[tuple[int, int], Tensor] = {}
        self._write = self.positions[:, 0]
        self._places = self._tiles = self.positions

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def begin(self, spans: Sequence[Span]) -> int:
        """Lays out a step: decodes, by ascending slot, and then prompt chunks.

        Returns N, the rows of the forward, of which the last few may be padding. ``positions`` is
        ready after it.
        """
        counts = np.array([span.count for span in spans])
        starts = np.array([span.start for span in spans])
        slots = np.repeat([span.slot for span in spans], counts)
        total = int(counts.sum())
        offset = np.arange(total) - np.repeat(counts.cumsum() - counts, counts)
        positions = np.repeat(starts, counts) + offset
        rows = max(total, self._min_rows)
        padded = np.zeros((rows, 1), dtype=np.int64)
        padded[:total, 0] = positions
        device = self.keys.device
        self.positions = send(torch.from_numpy(padded), device)
        self.end = int(positions.max()) + 1
        if self._native is not None:
            self._places = torch.from_numpy(np.stack([slots, positions]))
            self._tiles = self._native.tiles(slots, positions)
            return rows
        self._decodes = sum(span.decode for span in spans)
        self._prefills = list(spans[self._decodes :])
        self._masks.clear()
        heads, length = self.keys.shape[2:4]
        write = (slots[:, None] * heads + np.arange(heads)) * length + positions[:, None]
        self._write = send(torch.from_numpy(write.reshape(-1)), device)
        self._runs = self._find_runs(spans[: self._decodes])
        return rows

    def _find_runs(self, decodes: Sequence[Span]) -> list[_Run]:
        runs: list[_Run] = []
        total = 0  # length that the last run's rows have of themselves
        for row, span in enumerate(decodes):
            length = padded_length(span.start + 1, self._group)
            if runs and span.slot == runs[-1].slot + row - runs[-1].first:
                last = runs[-1]
                longest = max(last.length, length)
                waste = longest * (row + 1 - last.first) - total - length
                if waste * self._row_bytes <= CALL_BYTES:
                    runs[-1] = _Run(last.first, row + 1, last.slot, longest)
                    total += length
                    continue
            runs.append(_Run(row, row + 1, span.slot, length))
            total = length
        return runs

    def _mask(self, first: int, last: int, length: int, window: int) -> Tensor:
        """``[last - first, length]`` of 0 where rows ``first`` to ``last`` see a key, else -inf.

        Built once for all layers of a step that have the same window.
        """
        mask = self._masks.get((first, window))
        if mask is None:
            places = self.positions[first:last]
            columns = self._columns[:length]
            hidden = columns > places
            if window >= 0:
                hidden |= columns < places - window
            mask = torch.zeros(hidden.shape, dtype=self.keys.dtype, device=hidden.device)
            mask.masked_fill_(hidden, -torch.inf)
            self._masks[(first, window)] = mask
        return mask

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """``q [N, 1, H, D]``, ``k`` and ``v [N, 1, Hkv, D]`` → ``[N, 1, H, D]``."""
        N, _, H, D = q.shape
        keys, values = self.keys[layer], self.values[layer]  # [slots, Hkv, max_model_len, D]
        if self._native is not None:
            rows, where = (q[:, 0], k[:, 0], v[:, 0]), (self._places, self._tiles)
            return self._native.attention(*rows, keys, values, *where, window)[:, None]
        Hkv, row = keys.size(1), self._decodes
        q_NhgD = q.view(N, Hkv, H // Hkv, D)
        places = self._write.size(0)
        keys.view(-1, D).index_copy_(0, self._write, k.reshape(-1, D)[:places])
        values.view(-1, D).index_copy_(0, self._write, v.reshape(-1, D)[:places])
        y_NhgD = q.new_empty(q_NhgD.shape)
        for run in self._runs:
            y_NhgD[run.first : run.last] = self._decode(run, q_NhgD, keys, values, window)
        for span in self._prefills:
            held = keys[span.slot], values[span.slot]
            y_NhgD[row : row + span.count] = self._prefill(span, row, q_NhgD, *held, window)
            row += span.count
        if row < N:
            y_NhgD[row:] = 0
        return y_NhgD.view(N, 1, H, D)

    def _decode(
        self, run: _Run, q_NhgD: Tensor, keys: Tensor, values: Tensor, window: int
    ) -> Tensor:
        """``[n, Hkv, G, D]`` for the n rows of a run."""
        mask = self._mask(run.first, run.last, run.length, window)
        place = slice(run.slot, run.slot + run.last - run.first)
        return F.scaled_dot_product_attention(
            q_NhgD[run.first : run.last],
            keys[place, :, : run.length],
            values[place, :, : run.length],
            attn_mask=mask[:, None, None],
        )

    def _prefill(
        self, span: Span, row: int, q_NhgD: Tensor, keys: Tensor, values: Tensor, window: int
    ) -> Tensor:
        """``[T, Hkv, G, D]`` for the T rows of a prompt chunk that begin at ``row``."""
        T, (_, Hkv, G, D) = span.count, q_NhgD.shape
        length = padded_length(span.start + T, 2)
        mask = self._mask(row, row + T, length, window)
        q_hgTD = q_NhgD[row : row + T].permute(1, 2, 0, 3)
        q_hQD, Q = q_hgTD.reshape(Hkv, G * T, D), G * T
        if G > 1:
            mask = mask.repeat(G, 1)
        if short := padded_queries(Q) - Q:
            q_hQD, mask = F.pad(q_hQD, (0, 0, 0, short)), F.pad(mask, (0, 0, 0, short))
        y_hQD = F.scaled_dot_product_attention(
            q_hQD[None], keys[None, :, :length], values[None, :, :length], attn_mask=mask
        )[0, :, :Q]
        return y_hQD.view(Hkv, G, T, D).permute(2, 0, 1, 3)


class BlockStore:
    """Keys and values of kept prompt beginnings, in blocks that ``blocks.Blocks`` numbers.

    Copies instead of shared pages: reading 512 tokens back costs a hundredth of computing them,
    and decoding stays on contiguous memory.
    """

    def __init__(self, cache: SlotCache, blocks: int):
        layers, _, heads, _, size = cache.keys.shape
        shape = (layers, heads, blocks, BLOCK, size)
        self._pairs = [
            (held, zeros(shape, held.dtype, held.device)) for held in (cache.keys, cache.values)
        ]

    def load(self, places: Sequence[int], slot: int) -> None:
        """Copies blocks to the beginning of a slot."""
        at = send(torch.tensor(places), self._pairs[0][0].device)
        for slots, kept in self._pairs:  # straight to where they belong: `kept[:, :, at]` is a copy
            held = slots[:, slot, :, : len(places) * BLOCK]
            torch.index_select(kept, 2, at, out=held.unflatten(2, (len(places), BLOCK)))

    def save(self, slot: int, wanted: Sequence[tuple[int, int]]) -> None:
        """Copies blocks of a slot, (index in the slot, place), to their places."""
        first, count = wanted[0][0], len(wanted)
        at = send(torch.tensor([place for _, place in wanted]), self._pairs[0][0].device)
        for slots, kept in self._pairs:
            held = slots[:, slot, :, first * BLOCK : (first + count) * BLOCK]
            kept.index_copy_(2, at, held.unflatten(2, (count, BLOCK)))
