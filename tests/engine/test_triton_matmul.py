"""The batch-invariant matmul against float64, in the interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from nanochat_ray.engine import linear, triton_matmul
from nanochat_ray.engine.triton_matmul import matmul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(("M", "N", "K"), [(1, 3, 5), (65, 64, 64), (70, 130, 100), (0, 4, 4)])
def test_matmul_equals_float64(M: int, N: int, K: int) -> None:
    generator = torch.Generator().manual_seed(M)
    wide = torch.randn(M, K + 3, generator=generator).to(DEVICE)
    x, weight = wide[:, :K], torch.randn(N, K, generator=generator).to(DEVICE)
    exact = x.double() @ weight.double().T
    bound = K * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().T)
    assert bool(((matmul(x, weight).double() - exact).abs() <= bound).all())


@pytest.mark.parametrize(("M", "N", "K"), [(1, 3, 5), (4, 30, 1100), (2, 9, 4100), (0, 4, 4)])
def test_few_rows_equal_float64(M: int, N: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the layer of a GPU, which keeps cuBLAS for more rows."""
    monkeypatch.setattr(linear, "use_triton", lambda device: True)
    generator = torch.Generator().manual_seed(M)
    x = torch.randn(M, K + 3, generator=generator).to(DEVICE)[:, :K]
    layer = linear.DenseLinear((N, K), torch.float32, torch.device(DEVICE))
    layer.load(torch.randn(N, K, generator=generator))
    exact = x.double() @ layer.weight.double().T
    bound = torch.finfo(torch.float32).eps * K * (x.abs().double() @ layer.weight.abs().double().T)
    result = layer(x)
    assert bool(((result.double() - exact).abs() <= bound).all())
    for row in range(M):
        assert torch.equal(layer(x[row : row + 1])[0], result[row])
    more = torch.randn(triton_matmul.FEW_ROWS + 1, K, generator=generator).to(DEVICE)
    assert torch.equal(layer(more), F.linear(more, layer.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_row_has_equal_bits_in_any_batch(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(140, 72, generator=generator).to(DEVICE, dtype)
    weight = torch.randn(33, 72, generator=generator).to(DEVICE, dtype)
    whole = matmul(x, weight)
    for count in (1, 2, 17, 64, 65):
        assert torch.equal(matmul(x[:count], weight), whole[:count])
        # The interpreter's product is numpy's, whose bits depend on the place within a tile.
        first = 140 - count if DEVICE == "cuda" else triton_matmul.BLOCK_M
        part = slice(first, first + count)
        assert torch.equal(matmul(x[part], weight), whole[part])


def test_tiles_are_those_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no number of rows has an instruction of its own."""
    calls = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, int]):  # type: ignore[no-untyped-def]
            return lambda *args, **constants: calls.append((grid, constants))

    monkeypatch.setattr(triton_matmul, "_matmul_kernel", Kernel())
    weight = torch.zeros(100, 8)
    for rows in (1, 64, 200):
        matmul(torch.zeros(rows, 8), weight)
    assert [grid for grid, _ in calls] == [(1, 2), (1, 2), (4, 2)]
    assert all(constants == calls[0][1] for _, constants in calls)


def test_invariant_layers_of_a_gpu() -> None:
    layers = linear.make_linears(
        [(4, 8)], torch.float32, torch.device("meta"), is_batch_invariant=True
    )
    assert isinstance(layers[0], linear.InvariantLinear)
    layer = linear.InvariantLinear((4, 8), torch.float32, torch.device(DEVICE))
    layer.load(torch.eye(8, device=DEVICE)[:4])
    x = torch.arange(16.0, device=DEVICE).view(2, 8)
    assert torch.equal(layer(x), x[:, :4])
