"""Weights in the layouts of the C matmul (``csrc/weight_formats.h``), packed when they are loaded.

Legend: N output features, K input features, P panels of ``PANEL_WIDTH`` outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanochat_ray.engine.native import K_BLOCK, PANEL_WIDTH, Native


class PackedLinear:
    """The C kernel: float32 in and out, the weight in float32 or bfloat16.

    With a bfloat16 weight the input is rounded to bfloat16 too; sums are in float32.
    """

    def __init__(
        self,
        native: Native,
        shape: tuple[int, int],
        dtype: torch.dtype = torch.float32,
        memory: Tensor | None = None,
    ):
        """``memory`` is ``[packed_size(shape)]`` of ``dtype``, by default memory of its own."""
        self.out_features, self.in_features = shape
        self._native = native
        memory = torch.zeros(self.packed_size(shape), dtype=dtype) if memory is None else memory
        group = 4 // dtype.itemsize
        self.weight = memory.view(-(-shape[0] // PANEL_WIDTH), -1, PANEL_WIDTH, group)
        """``[P, K / group, PANEL_WIDTH, group]``: 4 bytes of each output, that is ``group`` inputs.
        K is rounded up to K_BLOCK; padding is 0."""

    @staticmethod
    def packed_size(shape: tuple[int, int]) -> int:
        """Elements of the packed weight, padding included."""
        N, K = shape
        return -(-N // PANEL_WIDTH) * PANEL_WIDTH * -(-K // K_BLOCK) * K_BLOCK

    def load(self, weight: Tensor) -> None:
        N = weight.size(0)
        full, rest = divmod(N, PANEL_WIDTH)
        # [P, K / group, group, PANEL_WIDTH]; ``inputs`` are those of one position in the groups.
        by_group = self.weight.transpose(2, 3)
        group = by_group.size(2)
        for i in range(group):
            inputs = weight[:, i::group]
            out = by_group[:, : inputs.size(1), i]
            panels = inputs[: full * PANEL_WIDTH].unflatten(0, (full, PANEL_WIDTH))
            out[:full].copy_(panels.transpose(1, 2))
            if rest:
                out[full, :, :rest].copy_(inputs[-rest:].t())

    def __call__(self, x: Tensor) -> Tensor:
        y = self._native.linear(x, self.weight)
        # A gate's few outputs are a slice, for the reason that ``PaddedLinear`` gives.
        return y if y.size(-1) == self.out_features else y[:, : self.out_features]
