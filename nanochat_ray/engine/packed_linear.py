"""Weights in the layouts of the C matmul (``csrc/weight_formats.h``), packed when they are loaded.

Legend: N output features, K input features, P panels of ``PANEL_WIDTH`` outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.engine.native import K_BLOCK, PANEL_WIDTH, Native
from nanochat_ray.machine import zeros

INT8_BLOCK, INT8_LIMIT = 32, 127
"""Inputs that share a scale, and the largest whole number."""
INT8_ROW_BYTES = INT8_BLOCK * PANEL_WIDTH
INT8_BLOCK_BYTES = INT8_ROW_BYTES + 2 * PANEL_WIDTH
"""Of a panel: whole numbers, and with the bfloat16 scales that follow them."""


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """``[N, K]`` as whole numbers ``[N, B, INT8_BLOCK]`` up to INT8_LIMIT, float32, times scales
    ``[N, B, 1]``, bfloat16: llama.cpp's Q8_0, whose scales are float16. K is rounded up to whole
    blocks; padding is 0."""
    padding = -weight.size(1) % INT8_BLOCK
    blocks = F.pad(weight.float(), (0, padding)).unflatten(1, (-1, INT8_BLOCK))
    largest = blocks.abs().amax(dim=2, keepdim=True)
    # Rounded up, so that no whole number exceeds the limit.
    bits = (largest / INT8_LIMIT).view(torch.int32)
    scales = ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)
    numbers = torch.where(scales > 0, blocks / scales, 0.0).round_()
    return numbers.clamp_(-INT8_LIMIT, INT8_LIMIT), scales.bfloat16()


class PackedLinear:
    """The C kernel: float32 in and out, the weight in float32 or bfloat16.

    With a bfloat16 weight the input is rounded to bfloat16 too; sums are in float32.
    """

    def __init__(
        self,
        native: Native,
        shape: tuple[int, int],
        memory: Tensor,
    ):
        """``memory`` is float32 or bfloat16 ``[packed_size(shape)]``."""
        self.out_features, self.in_features = shape
        self._native = native
        group = 4 // memory.dtype.itemsize
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


class PackedInt8Linear(PackedLinear):
    """The C kernel with ``quantize``'s weight.

    The input is quantized likewise, with float32 scales; sums of blocks are exact, and are added up
    in float32.
    """

    def __init__(self, native: Native, shape: tuple[int, int], memory: Tensor):
        """``memory`` is uint8 ``[packed_size(shape)]``."""
        self.out_features, self.in_features = shape
        self._native = native
        self.weight = memory.view(-(-shape[0] // PANEL_WIDTH), -1, INT8_BLOCK_BYTES)
        """``[P, B, INT8_BLOCK_BYTES]``: whole numbers + 128, ``[INT8_BLOCK / 4, PANEL_WIDTH, 4]``,
        then scales ``[PANEL_WIDTH / 2, 2]``, of outputs n and n + PANEL_WIDTH / 2."""

    @staticmethod
    def packed_size(shape: tuple[int, int]) -> int:
        """Bytes of the packed weight, padding included."""
        return PackedLinear.packed_size(shape) // INT8_ROW_BYTES * INT8_BLOCK_BYTES

    def load(self, weight: Tensor) -> None:
        P, B, _ = self.weight.shape
        N, K = weight.shape
        padding = (0, B * INT8_BLOCK - K, 0, P * PANEL_WIDTH - N)
        numbers, scales = quantize(F.pad(weight, padding))
        rows = (numbers + 128).view(P, PANEL_WIDTH, B, INT8_BLOCK // 4, 4).permute(0, 2, 3, 1, 4)
        self.weight[..., :INT8_ROW_BYTES].view(rows.shape).copy_(rows)
        pairs = scales.view(P, 2, PANEL_WIDTH // 2, B).permute(0, 3, 2, 1)
        self.weight[..., INT8_ROW_BYTES:].view(torch.bfloat16).view(pairs.shape).copy_(pairs)


def make_packed_linears(
    native: Native, shapes: Sequence[tuple[int, int]], dtype: torch.dtype
) -> list[PackedLinear]:
    """A layer for each weight shape, with weights in ``dtype``; int8 is ``PackedInt8Linear``."""
    kind, item = PackedLinear, dtype
    if dtype == torch.int8:
        kind, item = PackedInt8Linear, torch.uint8
    sizes = [kind.packed_size(shape) for shape in shapes]
    # One range of huge pages for all weights.
    memory = zeros([sum(sizes)], item, torch.device("cpu"), now=False).split(sizes)
    pairs = zip(shapes, memory, strict=True)
    return [kind(native, shape, memory=own) for shape, own in pairs]
