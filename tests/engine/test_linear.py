"""The layouts of linear layers: equal values, and how many rows they need for stable bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.engine.linear import (
    ColumnMajorLinear,
    DenseLinear,
    PaddedLinear,
    make_linears,
    min_invariant_rows,
    min_num_tokens,
)
from nanochat_ray.engine.packed_linear import INT8_BLOCK
from nanochat_ray.engine.precision import activation_dtype

CPU = torch.device("cpu")


def weight(outputs: int, inputs: int) -> torch.Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("outputs", [1, 6, 40, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_layouts_compute_the_same(outputs: int, dtype: torch.dtype) -> None:
    (layer,) = make_linears([(outputs, 96)], dtype, CPU)
    layer.load(weight(outputs, 96))
    x = torch.randn((5, 96)).to(activation_dtype(dtype))
    exact = weight(outputs, 96).double()
    out, error = layer(x), (layer(x).double() - F.linear(x.double(), exact)).abs()
    assert out.shape == (5, outputs)
    # Half a unit for the weight and half for the output, and the sums of 96 terms in float32.
    rounding = torch.finfo(out.dtype).eps + 96 * torch.finfo(torch.float32).eps
    bound = rounding * F.linear(x.double().abs(), exact.abs())
    if dtype == torch.int8:
        # Half a step of a block's 127, whose scale is rounded to bfloat16.
        largest = (
            exact.unflatten(1, (-1, INT8_BLOCK)).abs().amax(2).repeat_interleave(INT8_BLOCK, 1)
        )
        bound += (0.5 / 127 + 2**-8) * F.linear(x.double().abs(), largest)
    assert bool((error <= 1.01 * bound).all())


def test_layouts_follow_device_and_size() -> None:
    gate, large = make_linears([(6, 12), (64, 96)], torch.float32, CPU)
    assert isinstance(gate, PaddedLinear)
    assert isinstance(large, ColumnMajorLinear)
    assert large.weight.stride() == (1, 64)
    for layer in make_linears([(6, 12), (64, 96)], torch.bfloat16, torch.device("meta")):
        assert type(layer) is DenseLinear
        assert layer.weight.is_contiguous()


def test_loading_keeps_the_address() -> None:
    for layer in make_linears([(64, 96)], torch.float32, CPU):
        assert isinstance(layer, ColumnMajorLinear)
        address = layer.weight.data_ptr()
        for factor in (1, 2):
            layer.load(factor * weight(64, 96))
            assert layer.weight.data_ptr() == address
            assert torch.equal(layer.weight, factor * weight(64, 96))


@pytest.mark.parametrize(("unstable_below", "reference"), [(2, 2), (3, 4), (4, 4), (17, None)])
def test_trial_finds_unstable_rows(unstable_below: int, reference: int | None) -> None:
    class Unstable(DenseLinear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) + (len(x) < unstable_below)

    assert min_invariant_rows(Unstable((8, 8), torch.float32, CPU), torch.float32) == reference


def test_layers_need_at_most_four_tokens() -> None:
    shapes = [(96, 64), (6, 12), (64, 96), (96, 64)]
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        counts = [min_num_tokens([shape], dtype) for shape in shapes]
        assert set(counts) <= {2, 4}
        assert min_num_tokens(shapes, dtype) == max(counts)
