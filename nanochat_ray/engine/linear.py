"""Linear layers of an inference model: one interface, several layouts of the weight.

A row of the result should not depend on the rows beside it. ``PackedLinear`` guarantees that: its
C kernel adds up each sum in one order, whatever the batch (``csrc/gemm.c``). With torch's matmuls
on a CPU it depends on the library: Intel's MKL has that property from two rows on if the weight is
column-major (row-major, results change at 16 rows), as far as a trial at start-up shows
(``min_invariant_rows``). On other CPUs the rounding may depend on the batch.

Legend: N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.engine.native import Native
from nanochat_ray.engine.packed_linear import INT8_BLOCK, make_packed_linears, quantize
from nanochat_ray.engine.precision import activation_dtype
from nanochat_ray.machine import use_triton

MIN_PADDED_OUTPUTS = 32
"""On a CPU a layer with fewer outputs is computed as a slice of a wider one."""
ROW_THRESHOLDS = (2, 4)
"""Matmuls of one row have a kernel of their own everywhere, those of up to three on some CPUs."""
TRIAL_ROWS = (2, 3, 4, 5, 7, 16, 32, 33, 65)


class Linear(Protocol):
    """``y = x Wᵀ`` without bias; the weight stays at its address when it is loaded anew."""

    in_features: int
    out_features: int
    weight: Tensor
    """In the layer's own layout."""

    def load(self, weight: Tensor) -> None:
        """Copies ``weight [N, K]`` of any dtype and layout into the layer's own memory."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """``x [rows, K]`` → ``[rows, N]``, both in the dtype of activations."""
        ...


class DenseLinear:
    """torch's matmul with a row-major weight: the layout for CUDA."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        self.out_features, self.in_features = shape
        self.weight = torch.zeros(shape, dtype=dtype, device=device)

    def load(self, weight: Tensor) -> None:
        self.weight.copy_(weight)

    def __call__(self, x: Tensor) -> Tensor:
        if use_triton(x.device):
            from nanochat_ray.engine.triton_matmul import FEW_ROWS, multiply_few

            if len(x) <= FEW_ROWS:
                return multiply_few(x, self.weight)
        return F.linear(x, self.weight)


class InvariantLinear(DenseLinear):
    """A matmul on a GPU whose rows do not depend on their number, as cuBLAS's may."""

    def __call__(self, x: Tensor) -> Tensor:
        from nanochat_ray.engine.triton_matmul import matmul

        return matmul(x, self.weight)


class ColumnMajorLinear(DenseLinear):
    """torch's matmul with a column-major weight: the layout for MKL on a CPU."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype):
        self.out_features, self.in_features = shape
        self.weight = torch.zeros(shape[::-1], dtype=dtype).t()


class PaddedLinear:
    """A layer of few outputs, such as a gate: a slice of a wider matmul.

    MKL has kernels of their own for a weight of one row, whose sums depend on the number of rows of
    ``x``. Also, the result must not be contiguous: of a contiguous tensor torch's sigmoid computes
    vectors of 16 elements and the remainder by another formula, so that a row's gate would depend
    on its position in the batch.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype):
        self.out_features, self.in_features = shape
        self.weight = torch.zeros((shape[1], shape[0] // 8 * 8 + 8), dtype=dtype).t()

    def load(self, weight: Tensor) -> None:
        self.weight[: self.out_features].copy_(weight)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)[:, : self.out_features]


class QuantizedLinear:
    """torch's matmul with an int8 weight, made float32 for each call: as little memory as the C
    kernel needs, where that is missing, but slow."""

    def __init__(self, shape: tuple[int, int]):
        self.out_features, self.in_features = shape
        blocks = -(-self.in_features // INT8_BLOCK)
        # Padded and column-major, for the reasons of the two layouts above.
        outputs = self.out_features // 8 * 8 + 8
        self.weight = torch.zeros((blocks, INT8_BLOCK, outputs), dtype=torch.int8)
        self._scales = torch.zeros((blocks, 1, outputs), dtype=torch.bfloat16)

    def load(self, weight: Tensor) -> None:
        numbers, scales = quantize(weight)
        self.weight[..., : self.out_features].copy_(numbers.permute(1, 2, 0))
        self._scales[..., : self.out_features].copy_(scales.permute(1, 2, 0))

    def __call__(self, x: Tensor) -> Tensor:
        weight = (self.weight * self._scales.float()).flatten(0, 1)[: self.in_features]
        return F.linear(x, weight.t())[:, : self.out_features]


def make_linears(
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    device: torch.device,
    native: Native | None = None,
    is_batch_invariant: bool = False,
) -> list[Linear]:
    """A layer for each weight shape ``(N, K)``, zeros so far, with weights in ``dtype``.

    ``native`` and int8 are for a CPU, ``is_batch_invariant`` is for a GPU. Activations:
    ``precision.activation_dtype``.
    """
    if native is not None:
        return list(make_packed_linears(native, shapes, dtype))
    if dtype == torch.int8:
        return [QuantizedLinear(shape) for shape in shapes]
    if device.type != "cpu" and is_batch_invariant:
        return [InvariantLinear(shape, dtype, device) for shape in shapes]
    if device.type != "cpu":
        return [DenseLinear(shape, dtype, device) for shape in shapes]
    return [
        PaddedLinear(shape, dtype)
        if shape[0] < MIN_PADDED_OUTPUTS
        else ColumnMajorLinear(shape, dtype)
        for shape in shapes
    ]


def min_num_tokens(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> int:
    """The tokens that a step on a CPU must have, with torch's matmuls of these weight shapes, for
    the result of one not to depend on the others, as far as trials show."""
    noise = torch.Generator().manual_seed(1)
    distinct = sorted(set(shapes))
    layers = make_linears(distinct, dtype, torch.device("cpu"))
    num_tokens = 1
    for shape, layer in zip(distinct, layers, strict=True):
        layer.load(torch.randn(shape, generator=noise) / shape[1] ** 0.5)
        num_tokens = max(
            num_tokens, min_invariant_rows(layer, activation_dtype(dtype)) or ROW_THRESHOLDS[-1]
        )
    return num_tokens


@torch.inference_mode()
def min_invariant_rows(layer: Linear, dtype: torch.dtype) -> int | None:
    """The number of rows from which on a row's result does not depend on that number, as far as a
    trial shows; None if it always may."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn((300, layer.in_features), generator=noise).to(dtype)
    whole = layer(x)
    unequal = [n for n in TRIAL_ROWS if not torch.equal(layer(x[:n]), whole[:n])]
    return next((n for n in ROW_THRESHOLDS if not unequal or n > unequal[-1]), None)
