"""The operations between an inference model's matmuls, in Triton: one launch each.

Eager torch takes 4 launches for an RMSNorm, 12 for a rotary embedding with QK-norm and 2 for a
ReLU². Every program computes one row, in float32, so that a row does not depend on the batch.
"""

# Triton resolves every name in a kernel's signature: it can have no annotations but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096
"""Elements that a program of an element-wise kernel covers."""


@triton.jit
def _rms_norm_kernel(x_ptr, out_ptr, stride, size, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)
    tl.store(out_ptr + row * size + columns, (x * scale).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _rotary_qk_norm_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    token_stride,
    heads,
    eps,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One head of one token: its halves are rotated, then normalised together."""
    token = (tl.program_id(0) // heads).to(tl.int64)
    head = tl.program_id(0) % heads
    d = tl.arange(0, BLOCK)
    inside = d < HALF
    at = x_ptr + token * token_stride + head * 2 * HALF + d
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + d, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * HALF + d, mask=inside, other=0.0).to(tl.float32)
    a = first * cos + second * sin
    b = second * cos - first * sin
    scale = tl.rsqrt(tl.sum(a * a + b * b, axis=0) / (2 * HALF) + eps)
    to = out_ptr + (token * heads + head) * 2 * HALF + d
    tl.store(to, (a * scale).to(out_ptr.dtype.element_ty), inside)
    tl.store(to + HALF, (b * scale).to(out_ptr.dtype.element_ty), inside)


@triton.jit
def _relu_squared_kernel(x_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.maximum(tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32), 0.0)
    tl.store(x_ptr + at, (x * x).to(x_ptr.dtype.element_ty), inside)


@triton.jit
def _softcap_kernel(x_ptr, out_ptr, stride, size, cap, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(x_ptr + row * stride + at, mask=inside, other=0.0).to(tl.float32) / cap
    e = tl.exp(-2.0 * tl.abs(x))
    tanh = tl.where(x < 0, -1.0, 1.0) * (1.0 - e) / (1.0 + e)
    tl.store(out_ptr + row * size + at, cap * tanh, inside)


@triton.jit
def to_page(x, page_ptr):
    """``x`` in the dtype of the pages; FP8 ends at 448."""
    if page_ptr.dtype.element_ty == tl.float8e4nv:
        x = tl.minimum(tl.maximum(x.to(tl.float32), -448.0), 448.0)
    return x.to(page_ptr.dtype.element_ty)


@triton.jit
def _store_kv_kernel(
    k_ptr,
    v_ptr,
    keys_ptr,
    values_ptr,
    slot_mapping_ptr,
    k_stride,
    v_stride,
    size,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    k = tl.load(k_ptr + token * k_stride + columns, mask=inside)
    v = tl.load(v_ptr + token * v_stride + columns, mask=inside)
    tl.store(keys_ptr + slot * size + columns, to_page(k, keys_ptr), inside)
    tl.store(values_ptr + slot * size + columns, to_page(v, values_ptr), inside)


class TritonOperators:
    """Implements ``operators.Operators`` on a CUDA device."""

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        assert x.stride(1) == 1
        N, C = x.shape
        out = torch.empty((N, C), dtype=x.dtype, device=x.device)
        block = triton.next_power_of_2(C)
        if N:
            _rms_norm_kernel[(N,)](
                *(x, out, x.stride(0), C, eps), BLOCK=block, num_warps=_warps(block)
            )
        return out

    def rotary_qk_norm(self, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        N, H, D = x.shape
        assert x.stride(2) == 1
        assert x.stride(1) == D
        assert cos.is_contiguous()
        assert sin.is_contiguous()
        out = torch.empty((N, H, D), dtype=x.dtype, device=x.device)
        if N:
            _rotary_qk_norm_kernel[(N * H,)](
                *(x, cos, sin, out, x.stride(0), H, eps),
                HALF=D // 2,
                BLOCK=triton.next_power_of_2(D // 2),
                num_warps=1,
            )
        return out

    def relu_squared(self, x: Tensor) -> Tensor:
        assert x.is_contiguous()
        if x.numel():
            block = min(MAX_BLOCK, triton.next_power_of_2(x.numel()))
            grid = (triton.cdiv(x.numel(), block),)
            _relu_squared_kernel[grid](x, x.numel(), BLOCK=block, num_warps=_warps(block))
        return x

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def softcap(self, logits: Tensor, cap: float, out: Tensor | None = None) -> Tensor:
        """From any floating dtype to contiguous float32."""
        N, V = logits.shape
        if not cap or not N:
            return logits.float() if out is None else out.copy_(logits)
        assert logits.stride(1) == 1
        if out is None:
            out = torch.empty((N, V), dtype=torch.float32, device=logits.device)
        assert out.is_contiguous()
        block = min(MAX_BLOCK, triton.next_power_of_2(V))
        grid = (N, triton.cdiv(V, block))
        args = logits, out, logits.stride(0), V, cap
        _softcap_kernel[grid](*args, BLOCK=block, num_warps=_warps(block))
        return out


def store_kv(k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slot_mapping: Tensor) -> None:
    """Writes ``k`` and ``v [N, Hkv, D]`` to ``keys`` and ``values [blocks, block size, Hkv, D]``.

    ``slot_mapping`` (int64 ``[N]``) is where: block times block size plus the place in the block.
    """
    N, Hkv, D = k.shape
    assert k.stride(2) == v.stride(2) == 1
    assert k.stride(1) == v.stride(1) == D
    assert keys.is_contiguous()
    assert values.is_contiguous()
    block = triton.next_power_of_2(Hkv * D)
    if N:
        _store_kv_kernel[(N,)](
            *(k, v, keys, values, slot_mapping, k.stride(0), v.stride(0), Hkv * D),
            BLOCK=block,
            num_warps=_warps(block),
        )


def _warps(block: int) -> int:
    return min(8, max(1, block // 512))
