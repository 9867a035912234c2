"""Attention of new tokens to a paged KV cache, in Triton: chunked prefill and decode.

The algorithm is FlashAttention's online softmax (Dao et al., arXiv 2205.14135) over blocks of the
cache; a decode step is split over keys as in Flash-Decoding (Dao et al., 2023). The query heads of
one key/value head are packed into one tile, so that keys and values are read once for all of them.

The order in which a row is reduced depends on its own position alone: tiles of BLOCK_N keys from
key 0 on, and for a decode splits of SPLIT keys that are merged from the first on. So a row has the
same bits in any batch, which a split that fills the GPU would not give; a decode beside prompts is
split as one among decodes. Splits are short, since a decode waits for memory: more of them read at
the same time.

Legend: N tokens of the step, S sequences, X tiles, M blocks of the longest sequence, H query heads,
Hkv key/value heads, G = H / Hkv, D head size.
"""

# Triton resolves every name in a kernel's signature: it can have no annotations but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_ray.engine.kvcache.attention_metadata import tile_tokens

SPLIT = 128
"""Keys of one split of a decode."""
PROGRAMS = 1024
"""Programs of a step of decodes, about: where there are fewer sequences and heads, splits run side
by side, else one after the other. Empty programs cost as much as short ones."""
MERGE = 16
"""Splits that are merged at a time."""
BLOCK_N = 64
"""Keys of a tile."""
MIN_ROWS = 16
"""Rows that a tensor core's tile has at least."""


@triton.jit
def _load_block(pages_ptr, table_ptr, keys, present, kv_stride, first, D, d, SIZE: tl.constexpr):
    """``[BLOCK_N, BLOCK_D]``: keys or values of one head at the positions ``keys``."""
    pages = tl.load(table_ptr + keys // SIZE, mask=present, other=0)
    # 64 bits: a cache may hold more than 2^31 values.
    offsets = (pages.to(tl.int64) * SIZE + keys % SIZE) * kv_stride + first
    mask = present[:, None] & (d < D)[None, :]
    return tl.load(pages_ptr + offsets[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _online_softmax(scores, v_ND, top, total, sums_MD):
    """Adds a tile of scores and values to the running maximum, sum of weights and sums."""
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    # A row that has attended to no key yet: any finite shift gives weights of 0.
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp(scores - shift[:, None])
    decay = tl.exp(top - shift)
    total = total * decay + tl.sum(weights, axis=1)
    products = tl.dot(weights.to(v_ND.dtype), v_ND, input_precision="ieee")
    return new_top, total, sums_MD * decay[:, None] + products


@triton.jit
def _attend(
    q_MD, positions, k_ptr, v_ptr, table_ptr, kv_stride, first, start, end, window, scale, D, d,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest score, sum of weights and weighted sums over the keys ``start`` to ``end``."""
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for at in range(start // BLOCK_N * BLOCK_N, end, BLOCK_N):
        keys = at + tl.arange(0, BLOCK_N)
        present = keys < end
        k_ND = _load_block(k_ptr, table_ptr, keys, present, kv_stride, first, D, d, BLOCK_SIZE)
        v_ND = _load_block(v_ptr, table_ptr, keys, present, kv_stride, first, D, d, BLOCK_SIZE)
        # Keys and values may be FP8.
        k_ND, v_ND = k_ND.to(q_MD.dtype), v_ND.to(q_MD.dtype)
        scores = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
        visible = present[None, :] & (keys[None, :] <= positions[:, None])
        if window >= 0:
            visible = visible & (keys[None, :] >= positions[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        top, total, sums_MD = _online_softmax(scores, v_ND, top, total, sums_MD)
    return top, total, sums_MD


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sums_ptr, tops_ptr, tiles_ptr, block_table_ptr,
    q_stride, kv_stride, table_stride, num_splits, window, scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of tokens of one sequence, for one key/value head.

    Row r of the tile is token r // G and head r % G. SPLIT 0 is all keys; else a tile is one token,
    and a program computes every n-th split of its keys: float32 ``sums [X, H, splits, D]`` and
    ``tops [X, H, splits, 2]``, the largest score and the sum of weights.
    """
    tile, kv_head, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, first = tl.load(tiles_ptr + tile * 4), tl.load(tiles_ptr + tile * 4 + 1)
    count, position = tl.load(tiles_ptr + tile * 4 + 2), tl.load(tiles_ptr + tile * 4 + 3)
    if count == 0:
        return
    rows, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    tokens = rows // G
    inside = tokens < count
    positions = position + tokens  # [BLOCK_M]
    q_offsets = (first + tokens).to(tl.int64) * q_stride + (kv_head * G + rows % G) * D
    q_mask = inside[:, None] & (d < D)[None, :]
    q_MD = tl.load(q_ptr + q_offsets[:, None] + d[None, :], mask=q_mask, other=0.0)
    # Keys that any row of the tile attends to.
    end = position + count
    start = 0
    if window >= 0:
        start = tl.maximum(0, position - window)
    table_ptr = block_table_ptr + sequence * table_stride
    if SPLIT == 0:
        _, total, sums_MD = _attend(
            q_MD, positions, k_ptr, v_ptr, table_ptr, kv_stride, kv_head * D, start, end,
            window, scale, D, d, BLOCK_SIZE, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        out = (sums_MD / tl.where(total == 0.0, 1.0, total)[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + q_offsets[:, None] + d[None, :], out, mask=q_mask)
    else:
        heads = (tile * tl.num_programs(1) + kv_head).to(tl.int64) * G + rows
        # Splits are counted from the first that is inside the window.
        first_split = start // SPLIT
        for split in range(program, tl.cdiv(end, SPLIT) - first_split, tl.num_programs(2)):
            first_key = (first_split + split) * SPLIT
            top, total, sums_MD = _attend(
                q_MD, positions, k_ptr, v_ptr, table_ptr, kv_stride, kv_head * D,
                tl.maximum(start, first_key), tl.minimum(end, first_key + SPLIT),
                window, scale, D, d, BLOCK_SIZE, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            line = heads * num_splits + split
            tl.store(sums_ptr + line[:, None] * D + d[None, :], sums_MD, mask=q_mask)
            tl.store(tops_ptr + line * 2, top, mask=inside)
            tl.store(tops_ptr + line * 2 + 1, total, mask=inside)


@triton.jit
def _merge_kernel(
    sums_ptr,
    tops_ptr,
    out_ptr,
    tiles_ptr,
    q_stride,
    num_splits,
    window,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
):
    """The output of one decode token and head, from its splits in order."""
    tile, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    if tl.load(tiles_ptr + tile * 4 + 2) == 0:
        return
    row, position = tl.load(tiles_ptr + tile * 4 + 1), tl.load(tiles_ptr + tile * 4 + 3)
    count = tl.cdiv(position + 1, SPLIT)
    if window >= 0:
        count -= tl.maximum(0, position - window) // SPLIT
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sums_D = tl.zeros((BLOCK_D,), tl.float32)
    base = (tile * tl.num_programs(1) + head).to(tl.int64) * num_splits
    for at in range(0, count, MERGE):
        splits = at + tl.arange(0, MERGE)
        present = splits < count
        line = base + splits
        tops = tl.load(tops_ptr + line * 2, mask=present, other=float("-inf"))
        totals = tl.load(tops_ptr + line * 2 + 1, mask=present, other=0.0)
        mask = present[:, None] & (d < D)[None, :]
        split_sums = tl.load(sums_ptr + line[:, None] * D + d[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        decay = tl.exp(top - new_top)
        weights = tl.exp(tops - new_top)
        total = total * decay + tl.sum(totals * weights, axis=0)
        sums_D = sums_D * decay + tl.sum(split_sums * weights[:, None], axis=0)
        top = new_top
    out = (sums_D / total).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * q_stride + head * D + d, out, mask=d < D)


def _num_splits(max_seqlen_k: int, window: int) -> int:
    """Splits that the keys of a decode lie in, at most: a window begins and ends within one."""
    count = triton.cdiv(max_seqlen_k, SPLIT)
    return count if window < 0 else min(count, triton.cdiv(window + 1, SPLIT) + 1)


def _launch(
    tiles: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    out: Tensor,
    splits: tuple[Tensor, Tensor],
    window: int,
    tokens: int,
    split: int,
) -> None:
    """Attention of the ``tiles`` of at most so many ``tokens``; ``tensors`` are q, keys, values and
    block table, ``splits`` the sums and tops of a decode."""
    q, keys, values, block_table = tensors
    (_, H, D), (block_size, Hkv), num_splits = q.shape, keys.shape[1:3], splits[0].size(2)
    side_by_side = min(num_splits, triton.cdiv(PROGRAMS, tiles.size(0) * Hkv))
    _attention_kernel[(tiles.size(0), Hkv, side_by_side)](
        *(q, keys, values, out, *splits, tiles, block_table),
        *(q.stride(0), keys.stride(1), block_table.stride(0), num_splits, window, D**-0.5),
        G=H // Hkv,
        D=D,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        BLOCK_SIZE=block_size,
        BLOCK_M=max(MIN_ROWS, triton.next_power_of_2(tokens * (H // Hkv))),
        BLOCK_N=BLOCK_N,
        SPLIT=split,
        num_warps=4,
    )


def paged_attention(
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
    """``[N, H, D]``: causal softmax attention of ``q [N, H, D]`` to the cache, scaled by 1/√D.

    ``keys`` and ``values`` are ``[blocks, block size, Hkv, D]`` in the dtype of ``q`` or in FP8,
    and contain the new tokens already. ``tiles`` int32 ``[X, 4]`` as ``AttentionMetadata.tiles``,
    of at most ``tile_tokens`` each, the first ``num_decodes`` of one token each, which are split
    over keys; ``block_table`` int32 ``[S, M]``. A token sees itself and ``window`` earlier ones, or
    with -1 all. Rows of no tile are not written.
    """
    N, H, D = q.shape
    Hkv = keys.size(2)
    assert q.stride()[1:] == (D, 1)
    assert all(pages.is_contiguous() for pages in (keys, values, tiles))
    # ``out`` is addressed like ``q``, of which only the token stride may differ.
    q = q if q.stride(0) == H * D else q.contiguous()
    tensors = q, keys, values, block_table
    out = torch.empty((N, H, D), dtype=q.dtype, device=q.device)

    def buffer(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    if num_decodes:
        num_splits = _num_splits(max_seqlen_k, window)
        sums, tops = (buffer(num_decodes, H, num_splits, size) for size in (D, 2))
        _launch(tiles[:num_decodes], tensors, out, (sums, tops), window, 1, SPLIT)
        _merge_kernel[(num_decodes, H)](
            *(sums, tops, out, tiles, q.stride(0), num_splits, window),
            D=D,
            BLOCK_D=max(16, triton.next_power_of_2(D)),
            SPLIT=SPLIT,
            MERGE=MERGE,
            num_warps=4,
        )
    if tiles.size(0) > num_decodes:
        empty = buffer(0, 0, 1)
        tokens = tile_tokens(H // Hkv)
        _launch(tiles[num_decodes:], tensors, out, (empty, empty), window, tokens, 0)
    return out
