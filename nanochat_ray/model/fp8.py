"""Linear layers in 8-bit floating point, forward and backward, for Hopper's tensor cores.

Activations and weights are rounded to e4m3 (4 exponent bits), gradients to e5m2, whose range is
wider (Micikevicius et al., arXiv 2209.05433). Each tensor has one scale, from its largest element
at the time of use, so there is no history to checkpoint. Sums are accumulated in float32 and
rounded to bfloat16. On a CPU the same function runs slowly, so the numerics are tested there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FORWARD, BACKWARD = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16
"""Both sides of a matrix must be multiples of this for the tensor cores."""


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """``x`` rounded to ``dtype``, and its scale (float32, 0-d): ``x`` ≈ the first × the second."""
    largest = torch.finfo(dtype).max
    scale = x.detach().abs().amax().float().clamp_min(1e-12) / largest
    return (x.float() / scale).clamp(-largest, largest).to(dtype), scale


def _matmul(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    dtype: torch.dtype,
    *,
    fast: bool = False,
) -> Tensor:
    """``a [m, k] @ b [n, k]ᵀ``: the summed axis is last in both, as tensor cores need it.

    ``fast`` sums inside the tensor cores, in fewer bits than float32.
    """
    return torch._scaled_mm(
        a, b.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype, use_fast_accum=fast
    )


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x8, x_scale = quantize(x, FORWARD)
        w8, w_scale = quantize(weight, FORWARD)
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.weight_dtype = weight.dtype
        # Fast in the forward pass alone, as in torchao and nanochat: gradients need the bits.
        return _matmul(x8, w8, x_scale, w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = quantize(grads[0], BACKWARD)
        # The summed axis must be the last in memory, so operands are transposed and copied.
        grad_x = _matmul(g8, w8.t().contiguous(), g_scale, w_scale, grads[0].dtype)
        grad_w = _matmul(g8.t().contiguous(), x8.t().contiguous(), g_scale, x_scale, torch.bfloat16)
        return grad_x, grad_w.to(ctx.weight_dtype)


def fp8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x [..., k] @ weight [n, k]ᵀ`` by fp8 matmuls, in the dtype of ``x`` (bfloat16)."""
    flat: Tensor = _Fp8Linear.apply(x.reshape(-1, x.size(-1)), weight)
    return flat.view(*x.shape[:-1], -1)
