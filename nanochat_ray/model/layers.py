"""The network's layers of one operation. Most have no parameters, and are modules all the same: an
engine puts faster ones in their places (``engine/native.py``)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_ray.model.fp8 import fp8_linear
from nanochat_ray.model.fused import relu_squared, rms_norm
from nanochat_ray.model.rotary import rotate


class Linear(nn.Linear):
    """Without bias; float32 weights, cast to the activations' dtype where they are used."""

    fp8 = False

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 and self.training:
            return fp8_linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))


class Norm(nn.Module):
    """RMSNorm without parameters."""

    def __init__(self, eps: float | None):
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.eps)


class Turn(nn.Module):
    """Rotary embedding and RMSNorm of queries or keys ``[B, T, H, D]``: QK-norm."""

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], eps: float | None) -> Tensor:
        return rms_norm(rotate(x, *angles), eps)


class ReluSquared(nn.Module):
    """max(x, 0)²."""

    def forward(self, x: Tensor) -> Tensor:
        return relu_squared(x)


class Softcap(nn.Module):
    """``cap`` tanh(x / ``cap``), as in Gemma 2; 0 leaves logits as they are."""

    def __init__(self, cap: float):
        super().__init__()
        self.cap = cap

    def forward(self, logits: Tensor) -> Tensor:
        return self.cap * torch.tanh(logits / self.cap) if self.cap else logits
