"""Rotary embedding and RMSNorm of queries and keys in Triton, with the gradient in one piece.

A compiler computes the gradients of q, k and v one after the other and then copies them side by
side, as the matmul of all three needs them. Here one kernel reads each once and writes them where
they belong (train/BENCHMARKS.md: 7.1 ms of a step became 3.7).

Legend: B sequences of T tokens, H query heads, Hkv key/value heads, D head size.
"""

# Triton resolves every name in a kernel's signature: it can have no annotations but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rotary_norm_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, scale_ptr, T, eps,
    H: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The queries and keys of one token, and the factors of their RMSNorm."""
    D: tl.constexpr = 2 * HALF
    row = tl.program_id(0).to(tl.int64)
    heads, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)
    inside = (heads < H + HKV) & (d < HALF)[None, :]
    at = qkv_ptr + row * (H + 2 * HKV) * D + heads * D + d[None, :]
    first = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = (row % T) * HALF + d
    cos = tl.load(cos_ptr + angle, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + angle, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    a, b = first * cos + second * sin, second * cos - first * sin
    scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1, keep_dims=True) / D + eps)
    tl.store(scale_ptr + row * (H + HKV) + heads, scale, mask=heads < H + HKV)
    a, b = (a * scale).to(q_ptr.dtype.element_ty), (b * scale).to(q_ptr.dtype.element_ty)
    q = q_ptr + (row * H + heads) * D + d[None, :]
    tl.store(q, a, mask=inside & (heads < H))
    tl.store(q + HALF, b, mask=inside & (heads < H))
    k = k_ptr + (row * HKV + heads - H) * D + d[None, :]
    tl.store(k, a, mask=inside & (heads >= H))
    tl.store(k + HALF, b, mask=inside & (heads >= H))


@triton.jit
def _rotary_norm_grad_kernel(
    dq_ptr, dk_ptr, dv_ptr, q_ptr, k_ptr, scale_ptr, cos_ptr, sin_ptr, out_ptr, T,
    dq_b, dq_t, dq_h, dk_b, dk_t, dk_h, dv_b, dv_t, dv_h,
    H: tl.constexpr, HKV: tl.constexpr, HALF: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_KV: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of one token's queries, keys and values, from those of the kernel's results."""
    D: tl.constexpr = 2 * HALF
    row = tl.program_id(0).to(tl.int64)
    batch, t = row // T, row % T
    heads, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)
    column = d[None, :]
    is_q = (heads < H) & (column < HALF)
    is_k = (heads >= H) & (heads < H + HKV) & (column < HALF)
    dq = dq_ptr + batch * dq_b + t * dq_t + heads * dq_h + column
    dk = dk_ptr + batch * dk_b + t * dk_t + (heads - H) * dk_h + column
    q = q_ptr + (row * H + heads) * D + column
    k = k_ptr + (row * HKV + heads - H) * D + column
    # Each is 0 where the other is loaded.
    grad_a = tl.load(dq, mask=is_q, other=0.0) + tl.load(dk, mask=is_k, other=0.0)
    grad_b = tl.load(dq + HALF, mask=is_q, other=0.0) + tl.load(dk + HALF, mask=is_k, other=0.0)
    a = (tl.load(q, mask=is_q, other=0.0) + tl.load(k, mask=is_k, other=0.0)).to(tl.float32)
    b = tl.load(q + HALF, mask=is_q, other=0.0) + tl.load(k + HALF, mask=is_k, other=0.0)
    b, grad_a, grad_b = b.to(tl.float32), grad_a.to(tl.float32), grad_b.to(tl.float32)
    scale = tl.load(scale_ptr + row * (H + HKV) + heads, mask=heads < H + HKV, other=0.0)
    # dL/dx = (g - y · mean(g · y)) / rms(x)
    share = tl.sum(grad_a * a + grad_b * b, axis=1, keep_dims=True) / D
    grad_a, grad_b = (grad_a - a * share) * scale, (grad_b - b * share) * scale
    cos = tl.load(cos_ptr + t * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + t * HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + row * (H + 2 * HKV) * D + heads * D + column
    first, second = grad_a * cos - grad_b * sin, grad_a * sin + grad_b * cos
    tl.store(out, first.to(out_ptr.dtype.element_ty), mask=is_q | is_k)
    tl.store(out + HALF, second.to(out_ptr.dtype.element_ty), mask=is_q | is_k)
    kv_heads = tl.arange(0, BLOCK_KV)[:, None]
    is_v = (kv_heads < HKV) & (column < HALF)
    dv = dv_ptr + batch * dv_b + t * dv_t + kv_heads * dv_h + column
    out = out_ptr + row * (H + 2 * HKV) * D + (H + HKV + kv_heads) * D + column
    tl.store(out, tl.load(dv, mask=is_v, other=0.0), mask=is_v)
    tl.store(out + HALF, tl.load(dv + HALF, mask=is_v, other=0.0), mask=is_v)


def _empty_results(qkv: Tensor, head_dim: int, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    B, T, width = qkv.shape
    num_kv_heads = (width // head_dim - num_heads) // 2
    q, k = (qkv.new_empty(B, T, n, head_dim) for n in (num_heads, num_kv_heads))
    scale = qkv.new_empty(B, T, num_heads + num_kv_heads, dtype=torch.float32)
    return q, k, scale


# To torch.compile these are two operators, whose kernels stay as they are.
@torch.library.custom_op(
    "nanochat_ray::rotary_norm",
    mutates_args=(),
    schema="(Tensor qkv, Tensor cos, Tensor sin, int num_heads, float eps)"
    " -> (Tensor, Tensor, Tensor)",
)
def _rotary_norm(qkv, cos, sin, num_heads, eps):
    assert qkv.is_contiguous()
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    HALF = cos.size(1)
    q, k, scale = _empty_results(qkv, 2 * HALF, num_heads)
    H, Hkv = num_heads, k.size(2)
    _rotary_norm_kernel[(q.size(0) * q.size(1),)](
        *(qkv, cos, sin, q, k, scale, q.size(1), eps),
        H=H,
        HKV=Hkv,
        HALF=HALF,
        BLOCK_H=triton.next_power_of_2(H + Hkv),
        BLOCK_D=triton.next_power_of_2(HALF),
        num_warps=4,
    )
    return q, k, scale


@_rotary_norm.register_fake
def _(qkv, cos, sin, num_heads, eps):
    return _empty_results(qkv, 2 * cos.size(1), num_heads)


@torch.library.custom_op(
    "nanochat_ray::rotary_norm_grad",
    mutates_args=(),
    schema="(Tensor dq, Tensor dk, Tensor dv, Tensor q, Tensor k, Tensor scale, Tensor cos,"
    " Tensor sin) -> Tensor",
)
def _rotary_norm_grad(dq, dk, dv, q, k, scale, cos, sin):
    grads = [g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv)]
    (B, T, H, D), Hkv = q.shape, k.size(2)
    out = q.new_empty(B, T, (H + 2 * Hkv) * D)
    _rotary_norm_grad_kernel[(B * T,)](
        *(*grads, q, k, scale, cos, sin, out, T),
        *(stride for g in grads for stride in g.stride()[:3]),
        H=H,
        HKV=Hkv,
        HALF=D // 2,
        BLOCK_H=triton.next_power_of_2(H + Hkv),
        BLOCK_KV=triton.next_power_of_2(Hkv),
        BLOCK_D=triton.next_power_of_2(D // 2),
        num_warps=4,
    )
    return out


@_rotary_norm_grad.register_fake
def _(dq, dk, dv, q, k, scale, cos, sin):
    B, T, H, D = q.shape
    return q.new_empty(B, T, (H + 2 * k.size(2)) * D)


class _RotaryNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, scale = _rotary_norm(qkv, cos, sin, num_heads, eps)
        ctx.save_for_backward(q, k, scale, cos, sin)
        return q, k, qkv[..., -k.size(2) * k.size(3) :].unflatten(-1, k.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _rotary_norm_grad(*grads, *ctx.saved_tensors), None, None, None, None


def rotary_norm(
    qkv: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q ``[B, T, H, D]``, k and v ``[B, T, Hkv, D]`` of ``qkv [B, T, (H + 2 Hkv) D]``: q and k
    rotated (``rotary.rotate``) by the angles of ``cos`` and ``sin [T, D / 2]``, then RMSNorm of
    each head; v as it is, a view. Computed in float32, in the dtype of ``qkv``."""
    result: tuple[Tensor, Tensor, Tensor] = _RotaryNorm.apply(qkv, cos, sin, num_heads, eps)
    return result
