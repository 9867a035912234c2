"""The linear layer of the training model."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_ray.model.fp8 import fp8_linear


class Linear(nn.Linear):
    """Without bias; float32 weights, cast to the activations' dtype where they are used."""

    fp8 = False

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8 and self.training:
            return fp8_linear(x, self.weight)
        return F.linear(x, self.weight.to(x.dtype))
