"""Attention of new tokens to a paged KV cache, in Triton: chunked prefill and decode.

The algorithm is FlashAttention's online softmax (Dao et al., arXiv 2205.14135) over blocks of the
cache; a decode step is split over keys as in Flash-Decoding (Dao et al., 2023). The query heads of
one key/value head are packed into one tile, so that keys and values are read once for all of them.

The order in which a row is reduced depends on its own position alone: tiles of BLOCK_N keys from
key 0 on, and for a decode splits of SPLIT keys that are merged from the first on. So a row has the
same bits in any batch, which a split that fills the GPU would not give. Splits are short, since a
decode waits for memory: more of them read at the same time.

Legend: N tokens of the step, S sequences, T tokens of a tile, M blocks of the longest sequence, H
query heads, Hkv key/value heads, G = H / Hkv, D head size.
"""

# Triton resolves every name in a kernel's signature: it can have no annotations but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 128
"""Keys of one split of a decode."""
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
        scores = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale
        visible = present[None, :] & (keys[None, :] <= positions[:, None])
        if window >= 0:
            visible = visible & (keys[None, :] >= positions[:, None] - window)
        scores = tl.where(visible, scores, float("-inf"))
        top, total, sums_MD = _online_softmax(scores, v_ND, top, total, sums_MD)
    return top, total, sums_MD


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, sums_ptr, tops_ptr, cu_seqlens_q_ptr, seqused_k_ptr,
    block_table_ptr, q_stride, kv_stride, table_stride, tiles, num_splits, window, scale,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_T tokens of one sequence, for one key/value head and one split of keys.

    Row r of the tile is token r // G and head r % G. SPLIT 0 is all keys; else a tile is a
    sequence, whose splits write float32 ``sums [S, H, splits, D]`` and ``tops [S, H, splits, 2]``:
    the largest score and the sum of weights.
    """
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tile // tiles
    first = tl.load(cu_seqlens_q_ptr + sequence)
    count = tl.load(cu_seqlens_q_ptr + sequence + 1) - first
    token = (tile % tiles) * BLOCK_T
    if token >= count:
        return
    length = tl.load(seqused_k_ptr + sequence)
    rows, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    tokens = token + rows // G
    inside = (rows < BLOCK_T * G) & (tokens < count)
    positions = length - count + tokens  # [BLOCK_M]
    q_offsets = (first + tokens).to(tl.int64) * q_stride + (kv_head * G + rows % G) * D
    q_mask = inside[:, None] & (d < D)[None, :]
    q_MD = tl.load(q_ptr + q_offsets[:, None] + d[None, :], mask=q_mask, other=0.0)
    # Keys that any row of the tile attends to.
    end = tl.minimum(length, length - count + token + BLOCK_T)
    start = 0
    if window >= 0:
        start = tl.maximum(0, length - count + token - window)
    if SPLIT > 0:
        # Counted from the first that is inside the window.
        first_key = (start // SPLIT + split) * SPLIT
        start = tl.maximum(start, first_key)
        end = tl.minimum(end, first_key + SPLIT)
        if start >= end:  # which the merge leaves out
            return
    top, total, sums_MD = _attend(
        q_MD, positions, k_ptr, v_ptr, block_table_ptr + sequence * table_stride, kv_stride,
        kv_head * D, start, end, window, scale, D, d, BLOCK_SIZE, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if SPLIT > 0:
        heads = (sequence * tl.num_programs(1) + kv_head).to(tl.int64) * G + rows
        line = heads * num_splits + split
        tl.store(sums_ptr + line[:, None] * D + d[None, :], sums_MD, mask=q_mask)
        tl.store(tops_ptr + line * 2, top, mask=inside)
        tl.store(tops_ptr + line * 2 + 1, total, mask=inside)
    else:
        out = (sums_MD / tl.where(total == 0.0, 1.0, total)[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + q_offsets[:, None] + d[None, :], out, mask=q_mask)


@triton.jit
def _merge_kernel(
    sums_ptr,
    tops_ptr,
    out_ptr,
    seqused_k_ptr,
    q_stride,
    num_splits,
    window,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr,
    MERGE: tl.constexpr,
):
    """The output of one decode token and head, from its splits in order."""
    sequence, head = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    length = tl.load(seqused_k_ptr + sequence)
    count = tl.cdiv(length, SPLIT)
    if window >= 0:
        count -= tl.maximum(0, length - 1 - window) // SPLIT
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    sums_D = tl.zeros((BLOCK_D,), tl.float32)
    base = (sequence * tl.num_programs(1) + head).to(tl.int64) * num_splits
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
    offsets = sequence.to(tl.int64) * q_stride + head * D + d
    # The sequences that only fill a graph have no keys.
    out = sums_D / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=d < D)


def _num_splits(max_seqlen_k: int, window: int) -> int:
    """Splits that the keys of a decode lie in, at most: a window begins and ends within one."""
    count = triton.cdiv(max_seqlen_k, SPLIT)
    return count if window < 0 else min(count, triton.cdiv(window + 1, SPLIT) + 1)


def paged_attention(
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
    """``[N, H, D]``: causal softmax attention of ``q [N, H, D]`` to the cache, scaled by 1/√D.

    ``keys`` and ``values`` are ``[blocks, block size, Hkv, D]`` in the dtype of ``q`` and contain
    the new tokens already. Sequence i has tokens ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]``
    (int32 ``[S + 1]``), which are the last of its ``seqused_k[i]`` (int32 ``[S]``); its blocks are
    ``block_table[i]`` (int32 ``[S, M]``). A token sees itself and ``window`` earlier ones, or with
    -1 all. Where ``max_seqlen_q`` is 1 the sequences are split over keys.
    """
    N, H, D = q.shape
    block_size, Hkv = keys.shape[1:3]
    assert q.stride()[1:] == (D, 1)
    assert all(pages.is_contiguous() for pages in (keys, values))
    S, G = seqused_k.size(0), H // Hkv
    out = torch.empty((N, H, D), dtype=q.dtype, device=q.device)
    is_decode = max_seqlen_q == 1
    block_t = 1 if is_decode else max(1, 64 // triton.next_power_of_2(G))
    block_m = max(MIN_ROWS, triton.next_power_of_2(block_t * G))
    head = {"D": D, "BLOCK_D": max(16, triton.next_power_of_2(D))}
    tiles = triton.cdiv(max_seqlen_q, block_t)
    num_splits = _num_splits(max_seqlen_k, window) if is_decode else 1
    shape = (S, H, num_splits) if is_decode else (0,)
    sums = torch.empty((*shape, D), dtype=torch.float32, device=q.device)
    tops = torch.empty((*shape, 2), dtype=torch.float32, device=q.device)
    # ``out`` is addressed like ``q``, of which only the token stride may differ.
    q = q if q.stride(0) == H * D else q.contiguous()
    # A split in half precision is one tile; in float32 it would take all of the shared memory.
    block_n = SPLIT if is_decode and q.element_size() == 2 else BLOCK_N
    _attention_kernel[(S * tiles, Hkv, num_splits)](
        *(q, keys, values, out, sums, tops, cu_seqlens_q, seqused_k, block_table),
        *(q.stride(0), keys.stride(1), block_table.stride(0), tiles, num_splits, window, D**-0.5),
        **head,
        G=G,
        BLOCK_SIZE=block_size,
        BLOCK_T=block_t,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SPLIT=SPLIT if is_decode else 0,
        num_warps=4,
    )
    if is_decode:
        _merge_kernel[(S, H)](
            *(sums, tops, out, seqused_k, q.stride(0), num_splits, window),
            **head,
            SPLIT=SPLIT,
            MERGE=MERGE,
            num_warps=4,
        )
    return out
