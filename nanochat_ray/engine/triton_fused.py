"""What lies between the matmuls of an inference model, in Triton: one launch for each gap.

A transformer block is 10 launches: residual and norm; matmul; rotary embedding, QK-norm, value gate
and KV write; attention and its merge (``triton_attention``); matmul; residual and norm; matmul;
ReLU²; matmul. Separate operators take 17.

Every program computes one token, in float32, so that a token's bits do not depend on the batch.
Legend: N tokens, C channels, H and Hkv heads, D head size, K gate inputs.
"""

# Triton resolves every name in a kernel's signature: it can have no annotations but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_ray.engine.kvcache.kv_cache import KVTarget
from nanochat_ray.engine.triton_operators import to_page


class Gate(NamedTuple):
    """``factor[row]`` · sigmoid(first K channels · ``weight[0]``)."""

    weight: Tensor
    """``[rows, K]``"""
    num_inputs: int
    factor: Tensor
    row: int = 0


@triton.jit
def _normalise(x, size, eps):
    return x * tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)


@triton.jit
def _gate(x, weight_ptr, stride, columns, num_inputs):
    """sigmoid(x · w) of the first ``num_inputs`` channels ``x``."""
    inside = columns < num_inputs
    w = tl.load(weight_ptr + columns * stride, mask=inside, other=0.0).to(tl.float32)
    return 1.0 / (1.0 + tl.exp(-tl.sum(tl.where(inside, x * w, 0.0), axis=0)))


@triton.jit(do_not_specialize=["document_start"])
def _embed_kernel(
    ids_ptr, previous_ptr, table_ptr, gate_ptr, factor_ptr, out_ptr,
    size, gate_stride, num_inputs, document_start, eps,
    HAS_SMEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's normalised embedding, with a gated share of the previous token's."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    token = tl.load(ids_ptr + row)
    x = tl.load(table_ptr + token * size + columns, mask=inside, other=0.0).to(tl.float32)
    x = _normalise(x, size, eps)
    if HAS_SMEAR:
        previous = tl.load(previous_ptr + row)
        uses = (previous >= 0) & ((document_start < 0) | (token != document_start))
        at = table_ptr + tl.maximum(previous, 0) * size + columns
        before = _normalise(tl.load(at, mask=inside, other=0.0).to(tl.float32), size, eps)
        gate = _gate(x, gate_ptr, gate_stride, columns, num_inputs)
        gate = gate * tl.load(factor_ptr).to(tl.float32)
        x += tl.where(uses, gate, 0.0) * before
    tl.store(out_ptr + row * size + columns, x.to(out_ptr.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["layer", "skip_index"])
def _residual_norm_kernel(
    x_ptr, y_ptr, x0_ptr, scale_ptr, scale_0_ptr, skip_ptr, gate_ptr, factor_ptr, middle_ptr,
    backout_ptr, sum_ptr, out_ptr, norm_ptr, size, layer, skip_index, gate_stride, num_inputs, eps,
    HAS_Y: tl.constexpr, HAS_SCALES: tl.constexpr, SKIP: tl.constexpr, BACKOUT: tl.constexpr,
    KEEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token: x + y, scaled and mixed for the next block, and normalised. SKIP and BACKOUT: 0
    none, 1 of an earlier sum, 2 of this one."""
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    at = tl.program_id(0).to(tl.int64) * size + columns
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_Y:
        x += tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32)
    total = x
    if KEEPS:
        tl.store(sum_ptr + at, x.to(sum_ptr.dtype.element_ty), inside)
    if BACKOUT > 0:
        middle = total
        if BACKOUT == 1:
            middle = tl.load(middle_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x -= tl.load(backout_ptr).to(tl.float32) * middle
    if HAS_SCALES or SKIP > 0:
        x0 = tl.load(x0_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALES:
            scale = tl.load(scale_ptr + layer).to(tl.float32)
            x = scale * x + tl.load(scale_0_ptr + layer).to(tl.float32) * x0
        if SKIP > 0:
            skip = total
            if SKIP == 1:
                skip = tl.load(skip_ptr + at, mask=inside, other=0.0).to(tl.float32)
            gate = _gate(x0, gate_ptr, gate_stride, columns, num_inputs)
            x += gate * tl.load(factor_ptr + skip_index).to(tl.float32) * skip
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), inside)
    tl.store(norm_ptr + at, _normalise(x, size, eps).to(norm_ptr.dtype.element_ty), inside)


@triton.jit
def _qkv_kernel(
    qkv_ptr, positions_ptr, cos_ptr, sin_ptr, slots_ptr, ids_ptr, x_ptr, gate_ptr, table_ptr,
    q_ptr, keys_ptr, values_ptr, H, Hkv, x_size, gate_stride, gate_row_stride, num_inputs,
    q_scale, eps,
    HAS_VALUES: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One token: its queries, and its keys and values to the cache."""
    token = tl.program_id(0).to(tl.int64)
    D: tl.constexpr = 2 * HALF
    heads, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK)
    inside = (heads < H + Hkv) & (d < HALF)[None, :]
    row = qkv_ptr + token * (H + 2 * Hkv) * D + d[None, :]
    first = tl.load(row + heads * D, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(row + heads * D + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = tl.load(positions_ptr + token) * HALF + d
    cos = tl.load(cos_ptr + angle, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    a, b = first * cos + second * sin, second * cos - first * sin
    scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / D + eps)
    q = q_ptr + (token * H + heads) * D + d[None, :]
    is_q, is_k = inside & (heads < H), inside & (heads >= H)
    tl.store(q, (a * scale * q_scale).to(q_ptr.dtype.element_ty), is_q)
    tl.store(q + HALF, (b * scale * q_scale).to(q_ptr.dtype.element_ty), is_q)
    slot = tl.load(slots_ptr + token) * Hkv
    at = (slot + heads - H) * D + d[None, :]
    tl.store(keys_ptr + at, to_page(a * scale, keys_ptr), is_k)
    tl.store(keys_ptr + at + HALF, to_page(b * scale, keys_ptr), is_k)
    kv_heads = tl.arange(0, BLOCK_KV)[:, None]
    inside = (kv_heads < Hkv) & (d < HALF)[None, :]
    at = row + (H + Hkv + kv_heads) * D
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    if HAS_VALUES:
        columns = tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + token * x_size + columns, mask=columns < num_inputs, other=0.0)
        at = gate_ptr + kv_heads * gate_row_stride + columns * gate_stride
        weight = tl.load(at, mask=(kv_heads < Hkv) & (columns < num_inputs), other=0.0)
        scores = tl.sum(x.to(tl.float32) * weight.to(tl.float32), axis=1, keep_dims=True)
        gate = 3.0 / (1.0 + tl.exp(-scores))
        at = table_ptr + (tl.load(ids_ptr + token) * Hkv + kv_heads) * D + d[None, :]
        first += gate * tl.load(at, mask=inside, other=0.0).to(tl.float32)
        second += gate * tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    at = (slot + kv_heads) * D + d[None, :]
    tl.store(values_ptr + at, to_page(first, values_ptr), inside)
    tl.store(values_ptr + at + HALF, to_page(second, values_ptr), inside)


def embed(
    ids: Tensor, previous: Tensor, table: Tensor, smear: Gate | None, document_start: int,
    dtype: torch.dtype, eps: float,
) -> Tensor:  # fmt: skip
    """``[N, C]``: normalised rows of ``table [V, C]``; ``smear`` gates those of ``previous``."""
    N, C = ids.size(0), table.size(1)
    out = torch.empty((N, C), dtype=dtype, device=ids.device)
    gate = smear or Gate(table, 0, table)
    if N:
        _embed_kernel[(N,)](
            *(ids, previous, table, gate.weight, gate.factor, out),
            *(C, gate.weight.stride(1), gate.num_inputs, document_start, eps),
            HAS_SMEAR=smear is not None,
            BLOCK=triton.next_power_of_2(C),
            num_warps=_warps(C),
        )
    return out


def residual_norm(
    x: Tensor,
    y: Tensor | None,
    eps: float,
    *,
    x0: Tensor | None = None,
    scales: tuple[Tensor, Tensor, int] | None = None,
    skip: tuple[Tensor | None, Gate] | None = None,
    backout: tuple[Tensor | None, Tensor] | None = None,
    keeps: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(residual stream, its RMSNorm, x + y), each ``[N, C]``; the last only where it ``keeps``.

    The stream is x + y, minus ``backout[1]`` · ``backout[0]``; with ``scales`` of layer i it is
    ``scales[0][i]`` · that + ``scales[1][i]`` · ``x0``; with ``skip`` plus gate · ``skip[0]``,
    where the gate reads ``x0``. A None in either is x + y itself.
    """
    N, C = x.shape
    out, norm = torch.empty_like(x), torch.empty_like(x)
    total = torch.empty_like(x) if keeps else out
    scale, scale_0, layer = scales or (x, x, 0)
    skip_x, gate = skip or (None, Gate(x, 0, x))
    middle, factor = backout or (None, x)
    if N:
        _residual_norm_kernel[(N,)](
            *(x, x if y is None else y, x if x0 is None else x0, scale, scale_0),
            *(x if skip_x is None else skip_x, gate.weight, gate.factor),
            *(x if middle is None else middle, factor, total, out, norm),
            *(C, layer, gate.row, gate.weight.stride(1), gate.num_inputs, eps),
            HAS_Y=y is not None,
            HAS_SCALES=scales is not None,
            SKIP=0 if skip is None else 2 if skip_x is None else 1,
            BACKOUT=0 if backout is None else 2 if middle is None else 1,
            KEEPS=keeps,
            BLOCK=triton.next_power_of_2(C),
            num_warps=_warps(C),
        )
    return out, norm, total


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    tables: tuple[Tensor, Tensor],
    target: KVTarget,
    num_heads: int,
    q_scale: float,
    eps: float,
    values: tuple[Tensor, Tensor, Tensor, int, Tensor] | None = None,
) -> Tensor:
    """Queries ``[N, H, D]``, rotated, normalised and scaled; keys and values go to ``target``.

    ``qkv [N, (H + 2 Hkv) D]``; ``tables`` are cos and sin ``[positions, D / 2]``. ``values``: (ids,
    x ``[N, C]``, gate weight ``[Hkv, K]``, K, embeddings ``[V, Hkv D]``), of which 3 · gate ·
    embedding is added to a value.
    """
    N, (Hkv, D) = qkv.size(0), target.keys.shape[2:]
    assert qkv.is_contiguous()
    assert all(t.is_contiguous() for t in (target.keys, target.values, *tables))
    q = torch.empty((N, num_heads, D), dtype=qkv.dtype, device=qkv.device)
    ids, x, weight, num_inputs, embeddings = values or (positions, qkv, qkv, 0, qkv)
    if N:
        block_h, block = triton.next_power_of_2(num_heads + Hkv), triton.next_power_of_2(D // 2)
        _qkv_kernel[(N,)](
            *(qkv, positions, *tables, target.slot_mapping, ids, x, weight, embeddings),
            *(q, target.keys, target.values, num_heads, Hkv, x.size(1)),
            *(weight.stride(1), weight.stride(0), num_inputs, q_scale, eps),
            HAS_VALUES=values is not None,
            HALF=D // 2,
            BLOCK_H=block_h,
            BLOCK_KV=triton.next_power_of_2(Hkv),
            BLOCK=block,
            BLOCK_K=triton.next_power_of_2(max(1, num_inputs)),
            num_warps=_warps(block_h * block),
        )
    return q


def _warps(columns: int) -> int:
    return min(8, max(1, triton.next_power_of_2(columns) // 256))
