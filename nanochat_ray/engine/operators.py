"""The operations of an inference model beside its matmuls and its attention.

``TorchOperators`` computes them with torch, ``native.Native`` in C.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from nanochat_ray.model.fused import relu_squared, rms_norm
from nanochat_ray.model.loss import softcap
from nanochat_ray.model.rotary import rotate


class Operators(Protocol):
    """All but ``rms_norm`` may work in place: use the result, not the argument.

    Legend: N tokens, C channels, H heads, D head size.
    """

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        """RMSNorm without parameters of ``x [N, C]``."""
        ...

    def rotary_qk_norm(self, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        """Rotary embedding, then RMSNorm, of ``x [N, H, D]``; ``cos`` and ``sin [N, D / 2]``."""
        ...

    def relu_squared(self, x: Tensor) -> Tensor:
        """max(x, 0)² of contiguous ``x``."""
        ...

    def sigmoid(self, x: Tensor) -> Tensor:
        """Of the gates ``x [N, H]``, a slice of a matmul's result."""
        ...

    def softcap(self, logits: Tensor, cap: float, out: Tensor | None = None) -> Tensor:
        """``cap`` tanh(logits / ``cap``) of ``[N, V]``, in float32; 0 leaves them as they are.
        ``out`` is where the result goes, float32 ``[N, V]``."""
        ...


class TorchOperators:
    """For every device and dtype."""

    def rms_norm(self, x: Tensor, eps: float) -> Tensor:
        return rms_norm(x, eps)

    def rotary_qk_norm(self, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        return rms_norm(rotate(x, cos[:, None], sin[:, None]), eps)

    def relu_squared(self, x: Tensor) -> Tensor:
        return relu_squared(x)

    def sigmoid(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    def softcap(self, logits: Tensor, cap: float, out: Tensor | None = None) -> Tensor:
        result = softcap(logits.float(), cap)
        return result if out is None else out.copy_(result)
