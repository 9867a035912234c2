"""RMSNorm and ReLU² with hand-written gradients.

Eager torch makes about ten passes over memory for an RMSNorm and its gradient and six for a ReLU²;
these make five and four. On a CPU, where a small model is bound by memory more than by its matmuls,
that saves a tenth of the training step (optim/BENCHMARKS.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = length.square_().div_(x.size(-1)).add_(eps).rsqrt_().to(x.dtype)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        y, scale = ctx.saved_tensors
        # dL/dx = (g - y · mean(g · y)) / rms(x)
        share = torch.linalg.vecdot(grads[0], y).unsqueeze(-1) / -y.size(-1)
        return torch.addcmul(grads[0], y, share).mul_(scale), None


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (positive * grads[0]).mul_(2)


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x²) + eps)`` over the last axis, without parameters (arXiv 1910.07467)."""
    if not torch.is_grad_enabled():
        # Fewer kernel launches for the few rows of a decode step.
        return F.rms_norm(x, (x.size(-1),), eps=eps)
    return _RMSNorm.apply(x, eps)


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)² (So et al., arXiv 2109.08668)."""
    if not torch.is_grad_enabled():
        return x.relu().square_()
    return _SquaredReLU.apply(x)
