"""Keys and values in blocks that sequences hold as they grow, and attention over them.

For GPUs, where FlashAttention reads blocks where they lie. Elsewhere a reference with the same
interface gathers them: it is there to be compared with, and for tests of all around it.

Legend: N rows, S stretches of rows (each of one sequence), P pools of blocks, M blocks of the
longest sequence, H heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import current_flash_attention_impl

from nanochat_ray.config import ModelConfig
from nanochat_ray.engine.blocks import BLOCK, Blocks, Held
from nanochat_ray.engine.kv_cache import Span, padded_length, padded_queries
from nanochat_ray.engine.kv_memory import layer_windows
from nanochat_ray.machine import send


def block_size(device: torch.device) -> int:
    """Tokens of a block. FlashAttention 2, which is part of torch, wants 256; whoever has version
    3 activates it (``torch.nn.attention.activate_flash_attention_impl``) and has small ones."""
    small = device.type == "cpu" or current_flash_attention_impl() == "FA3"
    return BLOCK if small else 256


@dataclass
class Layout:
    """Where the rows of a step belong, in tensors that a CUDA graph can read."""

    longest: int
    """Most rows of a stretch."""
    positions: Tensor
    """int64 ``[N, 1]``"""
    queries: Tensor
    """int32 ``[S + 1]``: stretch i has rows ``queries[i]`` to ``queries[i + 1]``."""
    keys: Tensor
    """int32 ``[S + 1]``: the running sum of ``lengths``."""
    lengths: Tensor
    """int32 ``[S]``: keys that the last row of a stretch sees if it has no window."""
    tables: Tensor
    """int32 ``[P, S, M]``: the pages where those keys lie."""
    writes: Tensor
    """int64 ``[P, N]``: where the rows' own keys go, page by page."""

    def _tensors(self) -> list[Tensor]:
        return [self.positions, self.queries, self.keys, self.lengths, self.tables, self.writes]

    def to(self, device: torch.device) -> Layout:
        return Layout(self.longest, *(send(t, device) for t in self._tensors()))

    def copy_(self, other: Layout) -> None:
        for mine, theirs in zip(self._tensors(), other._tensors(), strict=True):
            mine.copy_(send(theirs, mine.device))


class PagedCache:
    """Implements ``AttentionContext``. Call ``begin`` before each forward.

    Page 0 of each pool is nobody's: place p of the pool is page p + 1. Padding writes there, and
    tables point there where a block was given back.
    """

    def __init__(
        self,
        config: ModelConfig,
        blocks: Blocks,
        slots: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        min_rows: int = 1,
    ):
        """``min_rows`` is the least number of rows of a forward."""
        self.block, self.device = blocks.block, device
        self.end = max_model_len
        self._min_rows = min_rows
        found = layer_windows(config, max_model_len)
        numbers = {pool.window: i for i, pool in enumerate(blocks.pools)}
        shape = blocks.block, config.n_kv_head, config.head_dim
        self._pages: list[tuple[int, Tensor, Tensor]] = []
        """For each layer: its pool, keys and values ``[pages, block, Hkv, D]``."""
        for pool in (numbers[window] for window in found):
            pages = blocks.pools[pool].capacity + 1
            # Zeros, not garbage: a masked value is multiplied by 0, and 0 * nan is nan.
            keys, values = torch.zeros((2, pages, *shape), dtype=dtype, device=device)
            self._pages.append((pool, keys, values))
        # Whoever pads has a slot too, behind the others, without blocks.
        width = -(-max_model_len // blocks.block)
        self._tables = np.zeros((len(blocks.pools), slots + 1, width), dtype=np.int32)
        self._attention: Callable[..., Any] = gathered_attention
        if device.type == "cuda":
            # It brings torch.compile: a second and a half that a CPU need not wait.
            from torch.nn.attention.varlen import varlen_attn

            self._attention = varlen_attn
        self.use(self.pack_weights([], 1).to(device))

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for _, k, v in self._pages)

    def assign(self, slot: int, held: Held) -> None:
        """Tells which blocks the sequence in a slot holds. Those that it has given back since
        need not be told: nobody looks there."""
        for table, places in zip(self._tables, held, strict=True):
            table[slot, : len(places)] = np.array(places, dtype=np.int32) + 1

    def begin(self, spans: Sequence[Span]) -> int:
        """Lays out a step; returns N, the rows of the forward, of which the last few may be
        padding. ``positions`` is ready after it."""
        self.use(self.pack_weights(spans).to(self.device))
        return self.positions.size(0)

    def use(self, layout: Layout) -> None:
        """The next forward is of this step."""
        self.layout, self.positions = layout, layout.positions

    def pack_weights(self, spans: Sequence[Span], rows: int = 0) -> Layout:
        """The step of these spans, padded to so many rows at least, in ordinary memory."""
        real = sum(span.count for span in spans)
        padding = max(0, max(rows, self._min_rows) - real)
        nobody = [Span(self._tables.shape[1] - 1, 0, 1, True)] * padding
        spans = [*spans, *nobody]
        counts = np.array([span.count for span in spans])
        starts = np.array([span.start for span in spans])
        slots = np.array([span.slot for span in spans])
        bounds = np.concatenate(([0], counts.cumsum()))
        owner = np.repeat(np.arange(len(spans)), counts)  # of each row
        positions = starts[owner] + np.arange(len(owner)) - bounds[owner]
        lengths = starts + counts
        pages = self._tables[:, slots[owner], positions // self.block].astype(np.int64)
        return Layout(
            longest=int(counts.max()),
            positions=torch.from_numpy(positions[:, None]),
            queries=torch.from_numpy(bounds.astype(np.int32)),
            keys=torch.from_numpy(np.concatenate(([0], lengths.cumsum())).astype(np.int32)),
            lengths=torch.from_numpy(lengths.astype(np.int32)),
            tables=torch.from_numpy(np.ascontiguousarray(self._tables[:, slots])),
            writes=torch.from_numpy(pages * self.block + positions % self.block),
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """``q [N, 1, H, D]``, ``k`` and ``v [N, 1, Hkv, D]`` → ``[N, 1, H, D]``."""
        pool, keys, values = self._pages[layer]
        step = self.layout
        for pages, new in ((keys, k), (values, v)):
            pages.flatten(0, 1).index_copy_(0, step.writes[pool], new[:, 0])
        y_NHD = self._attention(
            q[:, 0],
            keys,
            values,
            step.queries,
            # FlashAttention 2 checks its shape and reads ``seqused_k``; 3 wants no other length.
            None if current_flash_attention_impl() == "FA3" else step.keys,
            step.longest,
            self.end,
            window_size=(window, 0),
            enable_gqa=q.size(2) != k.size(2),
            seqused_k=step.lengths,
            block_table=step.tables[pool],
            # Split over keys, rows would depend on their company, and version 2 leaves some out
            # (pytorch issue 194167).
            num_splits=1,
        )
        return y_NHD[:, None]


def gathered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
    num_splits: int,
) -> Tensor:
    """What ``torch.nn.attention.varlen.varlen_attn`` computes, of what the cache asks of it.

    All rows are padded as ``kv_cache`` pads prompts: on most CPUs a row then has the same bits
    however many there are with it, and on all of them nearly the same values.
    """
    H, D = query.shape[1:]
    size, Hkv = key.shape[1:3]
    G = H // Hkv
    parts = []
    for i, (first, last) in enumerate(pairwise(cu_seq_q.tolist())):
        T, length = last - first, int(seqused_k[i])
        pages = block_table[i, : -(-length // size)]
        L = padded_length(length, 2)
        k_hLD, v_hLD = (
            F.pad(held[pages].flatten(0, 1)[:length], (0, 0, 0, 0, 0, L - length)).transpose(0, 1)
            for held in (key, value)
        )
        places = torch.arange(length - T, length)[:, None]
        columns = torch.arange(L)
        hidden = columns > places
        if window_size[0] >= 0:
            hidden |= columns < places - window_size[0]
        mask = torch.zeros((T, L), dtype=query.dtype).masked_fill_(hidden, -torch.inf)
        Q = G * T
        q_hQD = query[first:last].view(T, Hkv, G, D).permute(1, 2, 0, 3).reshape(Hkv, Q, D)
        short = padded_queries(Q) - Q
        y_hQD = F.scaled_dot_product_attention(
            F.pad(q_hQD, (0, 0, 0, short))[None],
            k_hLD[None],
            v_hLD[None],
            attn_mask=F.pad(mask.repeat(G, 1), (0, 0, 0, short)),
        )[0, :, :Q]
        parts.append(y_hQD.view(Hkv, G, T, D).permute(2, 0, 1, 3).reshape(T, H, D))
    return torch.cat(parts)
