"""Keys and values in blocks, which sequences get as they grow, and attention over them.

For GPUs, where a Triton kernel reads the blocks in place. Elsewhere a reference implementation with
the same signature gathers them; it exists for tests.

Legend: N tokens, S spans (each of one sequence), P block pools, M blocks of the longest sequence,
H heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from nanochat_ray.engine.cuda_graphs import GraphLimits, StepGraphs
from nanochat_ray.engine.kvcache.attention_metadata import (
    AttentionMetadata,
    MetadataShape,
    tile_tokens,
)
from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator, BlockTables
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE
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
        self.device, self.end = device, max_model_len
        self._min_num_tokens = min_num_tokens
        pool_of_window = {pool.window: i for i, pool in enumerate(allocator.pools)}
        shape = BLOCK_SIZE, config.n_kv_head, config.head_dim
        self._pages: list[tuple[int, Tensor, Tensor]] = []
        """For each layer: its pool, keys and values ``[pages, BLOCK_SIZE, Hkv, D]``."""
        for pool in (pool_of_window[w] for w in layer_windows(config, max_model_len)):
            pages = allocator.pools[pool].capacity + 1
            # Zeros, not garbage: a masked value is multiplied by 0, and 0 * nan is nan.
            keys, values = torch.zeros((2, pages, *shape), dtype=dtype, device=device)
            self._pages.append((pool, keys, values))
        self._max_blocks = -(-max_model_len // BLOCK_SIZE)
        shape = (len(allocator.pools), num_slots, self._max_blocks)
        self._block_tables = np.zeros(shape, dtype=np.int32)
        self._attention: Callable[..., Tensor] = gathered_attention
        self._store: Callable[..., None] = store_by_index
        self._uses_triton = use_triton(device)
        self._tile_tokens = max_model_len
        if self._uses_triton:
            from nanochat_ray.engine.triton_attention import paged_attention
            from nanochat_ray.engine.triton_operators import store_kv

            self._attention, self._store = paged_attention, store_kv
            self._tile_tokens = min(max_model_len, tile_tokens(config.n_head // config.n_kv_head))
        self.use(self.make_metadata([], 1).to(device))

    @property
    def nbytes(self) -> int:
        return sum(k.nbytes + v.nbytes for _, k, v in self._pages)

    def set_block_tables(self, slot: int, tables: BlockTables) -> None:
        """The blocks of the sequence in a slot. Blocks freed behind a window may stay: no token
        attends to them."""
        for table, block_ids in zip(self._block_tables, tables, strict=True):
            table[slot, : len(block_ids)] = np.array(block_ids, dtype=np.int32) + 1

    def step_graphs(self, model: InferenceModel, limits: GraphLimits) -> StepGraphs | None:
        return StepGraphs(model, self, limits) if self.device.type == "cuda" else None

    def prepare(self, spans: ArrayLike) -> int:
        self.use(self.make_metadata(spans).to(self.device))
        return self.positions.size(0)

    def use(self, metadata: AttentionMetadata) -> None:
        """Sets the step of the next forward."""
        self.metadata, self.positions = metadata, metadata.positions

    def make_metadata(self, spans: ArrayLike, num_tokens: int = 0) -> AttentionMetadata:
        """The step of these spans, padded to at least ``num_tokens``, in pageable CPU memory."""
        table = np.asarray(spans, dtype=np.int64).reshape(-1, 4)
        counts = table[:, 2]
        num_prompts = int((table[:, 3] == 0).sum())
        padding = max(0, max(num_tokens, self._min_num_tokens) - int(counts.sum()))
        num_decodes = len(table) - num_prompts + (0 if num_prompts else padding)
        num_tiles = num_decodes
        if num_prompts:
            prompt_counts = [*counts[len(table) - num_prompts :], padding]
            num_tiles += sum(-(-count // self._tile_tokens) for count in prompt_counts)
        num_spans = max(num_decodes, len(table) + (padding > 0))
        N = int(counts.sum()) + padding
        metadata = self.empty_metadata(MetadataShape(N, num_decodes, num_tiles, num_spans))
        self.fill_metadata([tensor.numpy() for tensor in metadata.tensors()], table, num_decodes)
        return metadata

    def empty_metadata(self, shape: MetadataShape) -> AttentionMetadata:
        """On the CPU, for ``fill_metadata``."""
        return AttentionMetadata.zeros(shape, self._block_tables.shape[0], self._max_blocks)

    def graph_shape(self, num_tokens: int, num_decodes: int, num_prompts: int) -> MetadataShape:
        """Large enough for all steps of at most so many tokens, decodes and prompts."""
        if not num_prompts:
            return MetadataShape(num_tokens, num_tokens, num_tokens, num_tokens)
        num_tiles = num_decodes + -(-num_tokens // self._tile_tokens) + num_prompts + 1
        return MetadataShape(num_tokens, num_decodes, num_tiles, num_decodes + num_prompts + 1)

    def fill_metadata(
        self, arrays: Sequence[np.ndarray], spans_S4: np.ndarray, num_decodes: int
    ) -> None:
        """Writes the step of the ``spans``, int64 rows as ``Span`` with decodes first, to the
        arrays of an ``AttentionMetadata``, which may be larger. Padding reads and writes page 0, so
        that it is finite: behind decodes alone it is further decodes, else it is prompts."""
        positions, tiles, block_tables, slot_mapping = arrays
        slots, starts, counts, is_decode = spans_S4.T
        S, D = len(slots), int(is_decode.sum())
        tiles[:] = 0
        last = D if len(tiles) > num_decodes else num_decodes
        tiles[:last, 0] = tiles[:last, 1] = np.arange(last)
        tiles[:last, 2] = 1
        tiles[:D, 3] = positions[:D] = starts[:D]
        end, at = D, num_decodes
        spans = list(zip(range(D, S), starts[D:].tolist(), counts[D:].tolist(), strict=True))
        for span, start, count in spans:
            positions[end : end + count] = np.arange(start, start + count)
            at = self._fill_tiles(tiles, at, span, end, start, count)
            end += count
        token_slots = np.repeat(slots, counts) if S > D else slots
        page = positions[:end] // BLOCK_SIZE
        for table, block_table, mapping in zip(
            self._block_tables, block_tables, slot_mapping, strict=True
        ):
            np.take(table, slots, axis=0, out=block_table[:S], mode="clip")
            block_table[S:] = 0
            mapping[:end] = table[token_slots, page] * BLOCK_SIZE
            mapping[:end] += positions[:end] % BLOCK_SIZE
            mapping[end:] = 0
        positions[end:] = 0
        while end < len(positions) and len(tiles) > num_decodes:
            # Each a prompt of its own, so that none is longer than a block table.
            count = min(len(positions) - end, self._tile_tokens)
            at = self._fill_tiles(tiles, at, S, end, 0, count)
            end += count

    def _fill_tiles(
        self, tiles: np.ndarray, at: int, span: int, first: int, start: int, count: int
    ) -> int:
        """Writes the tiles of a prompt from row ``at`` on; returns the row behind them."""
        offsets = np.arange(0, count, self._tile_tokens)
        rows = tiles[at : at + len(offsets)]
        rows[:, 0] = span
        rows[:, 1] = first + offsets
        rows[:, 2] = np.minimum(count - offsets, self._tile_tokens)
        rows[:, 3] = start + offsets
        return at + len(offsets)

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
            step.tiles,
            step.block_tables[pool],
            num_decodes=step.num_decodes,
            max_seqlen_k=self.end,
            window=window,
        )


def store_by_index(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor
) -> None:
    """Reference of ``triton_operators.store_kv``."""
    for pages, new in ((keys, k), (values, v)):
        if pages.dtype == torch.float8_e4m3fn:  # which ends at 448; torch copies its bytes alone
            numbers = new.clamp(-448, 448).to(pages.dtype).view(torch.uint8)
            pages.view(torch.uint8).flatten(0, 1).index_copy_(0, slot_mapping, numbers)
        else:
            pages.flatten(0, 1).index_copy_(0, slot_mapping, new)


def gathered_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: Tensor,
    block_table: Tensor,
    *,
    num_decodes: int,
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
    output = q.new_zeros((q.size(0), H, D))
    for span, first, T, start in tiles.tolist():
        if not T:
            continue
        length = start + T
        pages = block_table[span, : -(-length // size)]
        L = padded_length(length, 2)
        k_hLD, v_hLD = (
            F.pad(t[pages].to(q).flatten(0, 1)[:length], (0, 0, 0, 0, 0, L - length)).transpose(
                0, 1
            )
            for t in (keys, values)
        )
        positions = torch.arange(start, length)[:, None]
        columns = torch.arange(L)
        invisible = columns > positions
        if window >= 0:
            invisible |= columns < positions - window
        mask = torch.zeros((T, L), dtype=q.dtype).masked_fill_(invisible, -torch.inf)
        Q = G * T
        q_hQD = q[first : first + T].view(T, Hkv, G, D).permute(1, 2, 0, 3).reshape(Hkv, Q, D)
        short = padded_queries(Q) - Q
        y_hQD = F.scaled_dot_product_attention(
            F.pad(q_hQD, (0, 0, 0, short))[None],
            k_hLD[None],
            v_hLD[None],
            attn_mask=F.pad(mask.repeat(G, 1), (0, 0, 0, short)),
        )[0, :, :Q]
        y_TGD = y_hQD.view(Hkv, G, T, D).permute(2, 0, 1, 3)
        output[first : first + T] = y_TGD.reshape(T, H, D)
    return output
