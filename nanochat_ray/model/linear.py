"""The linear layer of the training model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_ray.model.fp8 import fp8_linear


class Linear(nn.Linear):
    """Without bias; float32 weights, cast to the activations' dtype where they are used."""

    fp8 = False

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._multiply(x, self.weight)

    def _multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        if self.fp8 and self.training:
            return fp8_linear(x, weight)
        return F.linear(x, weight.to(x.dtype))


def apply_together(x: Tensor, layers: Sequence[Linear]) -> Tensor:
    """The outputs of the layers for ``x [..., C]`` side by side, by one matmul."""
    return layers[0]._multiply(x, torch.cat([layer.weight for layer in layers]))
