"""Keys and values in blocks, which sequences get as they grow, and attention over them.

For GPUs, where a Triton kernel reads the blocks in place. Elsewhere a reference implementation with
the same signature gathers them; it exists for tests.

Legend: N tokens, S spans (each of one sequence), P block pools, M blocks of the longest sequence,
H heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.engine.cuda_graphs import DecodeGraphs
from nanochat_ray.engine.kvcache.attention_metadata import AttentionMetadata
from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator, BlockTables
from nanochat_ray.engine.kvcache.kv_cache import KVCache, KVTarget
from nanochat_ray.engine.kvcache.memory import layer_windows
from nanochat_ray.engine.kvcache.padding import padded_length, padded_queries
from nanochat_ray.engine.model import InferenceModel
from nanochat_ray.machine import use_triton
from nanochat_ray.model.config import ModelConfig


class PagedCache(KVCache):
    """Page 0 of each pool belongs to no sequence: block b of the pool is page b + 1. Padding is
    written to page 0, and it stands in block tables for ``NULL_BLOCK``.
    """

    def __init__(
        self,
        config: ModelConfig,
        allocator: BlockAllocator,
        num_slots: int,
        max_model_len: int,
        dtype: torch.dtype,
        device: torch.device,
        min_num_tokens: int = 1,
    ):
        """``min_num_tokens``: the least number of tokens of a forward."""
        self.block_size, self.device = allocator.block_size, device
        self.end = max_model_len
        self._min_num_tokens = min_num_tokens
        pool_of_window = {pool.window: i for i, pool in enumerate(allocator.pools)}
        shape = allocator.block_size, config.n_kv_head, config.head_dim
        self._pages: list[tuple[int, Tensor, Tensor]] = []
        """For each layer: its pool, keys and values ``[pages, block_size, Hkv, D]``."""
        for pool in (pool_of_window[w] for w in layer_windows(config, max_model_len)):
            pages = allocator.pools[pool].capacity + 1
            # Zeros, not garbage: a masked value is multiplied by 0, and 0 * nan is nan.
            keys, values = torch.zeros((2, pages, *shape), dtype=dtype, device=device)
            self._pages.append((pool, keys, values))
        # Padding has a slot too, the last one, without blocks.
        max_blocks = -(-max_model_len // allocator.block_size)
        shape = (len(allocator.pools), num_slots + 1, max_blocks)
        self._block_tables = np.zeros(shape, dtype=np.int32)
        self._attention: Callable[..., Tensor] = gathered_attention
        self._store: Callable[..., None] = store_by_index
        self._uses_triton = use_triton(device)
        if self._uses_triton:
            from nanochat_ray.engine.triton_attention import paged_attention
            from nanochat_ray.engine.triton_operators import store_kv

            self._attention, self._store = paged_attention, store_kv
        self.use(self.make_metadata([], 1).to(device))

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for _, k, v in self._pages)

    def set_block_tables(self, slot: int, tables: BlockTables) -> None:
        """The blocks of the sequence in a slot. Blocks freed behind a window may stay: no token
        attends to them."""
        for table, block_ids in zip(self._block_tables, tables, strict=True):
            table[slot, : len(block_ids)] = np.array(block_ids, dtype=np.int32) + 1

    def decode_graphs(self, model: InferenceModel, max_num_tokens: int) -> DecodeGraphs | None:
        return DecodeGraphs(model, self, max_num_tokens) if self.device.type == "cuda" else None

    def prepare(self, spans: Sequence[Span]) -> int:
        self.use(self.make_metadata(spans).to(self.device))
        return self.positions.size(0)

    def use(self, metadata: AttentionMetadata) -> None:
        """Sets the step of the next forward."""
        self.metadata, self.positions = metadata, metadata.positions

    def make_metadata(self, spans: Sequence[Span], num_tokens: int = 0) -> AttentionMetadata:
        """The step of these spans, padded to at least ``num_tokens``, in pageable CPU memory."""
        real = sum(span.num_tokens for span in spans)
        padding = max(0, max(num_tokens, self._min_num_tokens) - real)
        pad_span = Span(self._block_tables.shape[1] - 1, 0, 1, True)
        spans = [*spans, *[pad_span] * padding]
        counts = np.array([span.num_tokens for span in spans])
        starts = np.array([span.start for span in spans])
        slots = np.array([span.slot for span in spans])
        bounds = np.concatenate(([0], counts.cumsum()))
        span_of = np.repeat(np.arange(len(spans)), counts)  # of each token
        positions = starts[span_of] + np.arange(len(span_of)) - bounds[span_of]
        lengths = starts + counts
        size = self.block_size
        pages = self._block_tables[:, slots[span_of], positions // size].astype(np.int64)
        return AttentionMetadata(
            max_seqlen_q=int(counts.max()),
            positions=torch.from_numpy(positions),
            cu_seqlens_q=torch.from_numpy(bounds.astype(np.int32)),
            seqused_k=torch.from_numpy(lengths.astype(np.int32)),
            block_tables=torch.from_numpy(np.ascontiguousarray(self._block_tables[:, slots])),
            slot_mapping=torch.from_numpy(pages * size + positions % size),
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """``q [N, H, D]``, ``k`` and ``v [N, Hkv, D]`` → ``[N, H, D]``."""
        self._store(k, v, *self.kv_target(layer))
        return self.attend_pages(layer, q, window)

    @property
    def pages(self) -> PagedCache | None:
        return self if self._uses_triton else None

    def kv_target(self, layer: int) -> KVTarget:
        """See ``triton_forward.PagedKeys``."""
        pool, keys, values = self._pages[layer]
        return KVTarget(keys, values, self.metadata.slot_mapping[pool])

    def attend_pages(self, layer: int, q: Tensor, window: int) -> Tensor:
        """See ``triton_forward.PagedKeys``."""
        pool, keys, values = self._pages[layer]
        step = self.metadata
        return self._attention(
            q,
            keys,
            values,
            step.cu_seqlens_q,
            step.seqused_k,
            step.block_tables[pool],
            max_seqlen_q=step.max_seqlen_q,
            max_seqlen_k=self.end,
            window=window,
        )


def store_by_index(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor
) -> None:
    """Reference of ``triton_operators.store_kv``."""
    keys.flatten(0, 1).index_copy_(0, slot_mapping, k)
    values.flatten(0, 1).index_copy_(0, slot_mapping, v)


def gathered_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens_q: Tensor,
    seqused_k: Tensor,
    block_table: Tensor,
    *,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window: int = -1,
) -> Tensor:
    """Reference of ``triton_attention.paged_attention``.

    All rows are padded as ``SlotCache`` pads prompts: on most CPUs a row then has the same bits
    whatever the batch, and on all of them nearly the same values.
    """
    H, D = q.shape[1:]
    size, Hkv = keys.shape[1:3]
    G = H // Hkv
    outputs = []
    for i, (first, last) in enumerate(pairwise(cu_seqlens_q.tolist())):
        T, length = last - first, int(seqused_k[i])
        pages = block_table[i, : -(-length // size)]
        L = padded_length(length, 2)
        k_hLD, v_hLD = (
            F.pad(t[pages].flatten(0, 1)[:length], (0, 0, 0, 0, 0, L - length)).transpose(0, 1)
            for t in (keys, values)
        )
        positions = torch.arange(length - T, length)[:, None]
        columns = torch.arange(L)
        invisible = columns > positions
        if window >= 0:
            invisible |= columns < positions - window
        mask = torch.zeros((T, L), dtype=q.dtype).masked_fill_(invisible, -torch.inf)
        Q = G * T
        q_hQD = q[first:last].view(T, Hkv, G, D).permute(1, 2, 0, 3).reshape(Hkv, Q, D)
        short = padded_queries(Q) - Q
        y_hQD = F.scaled_dot_product_attention(
            F.pad(q_hQD, (0, 0, 0, short))[None],
            k_hLD[None],
            v_hLD[None],
            attn_mask=F.pad(mask.repeat(G, 1), (0, 0, 0, short)),
        )[0, :, :Q]
        outputs.append(y_hQD.view(Hkv, G, T, D).permute(2, 0, 1, 3).reshape(T, H, D))
    return torch.cat(outputs)
