"""The Triton operators against float64, in the interpreter where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nanochat_ray.engine.operators import TorchOperators

pytest.importorskip("triton")
from nanochat_ray.engine.kvcache.paged_cache import store_by_index
from nanochat_ray.engine.triton_operators import TritonOperators, store_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
TORCH, TRITON = TorchOperators(), TritonOperators()


def check(result: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, terms: int = 1) -> None:
    """Within the rounding of the output and of float32 sums of ``terms`` of the largest value."""
    if not exact.numel():
        return
    eps = torch.finfo(torch.float32).eps * (terms + 8)
    rounding = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    error = (result.cpu().double() - exact).abs()
    assert (error <= eps * exact.abs().amax() + rounding * exact.abs()).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [2**-23, 1e-6])
@pytest.mark.parametrize(("N", "C"), [(3, 64), (1, 40), (0, 16)])
def test_rms_norm(N: int, C: int, eps: float, dtype: torch.dtype) -> None:
    x = torch.randn(N, 2 * C, generator=torch.Generator().manual_seed(C)).to(dtype)
    double = x[:, :C].double()
    exact = double / (double.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    result = TRITON.rms_norm(x.to(DEVICE)[:, :C], eps)
    assert result.dtype == dtype
    check(result, exact, dtype, C)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "H", "D"), [(3, 5, 16), (2, 1, 24)])
def test_rotary_qk_norm(N: int, H: int, D: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(D)
    qkv = torch.randn(N, H + 2, D, generator=generator).to(dtype)
    angles = torch.rand(N, D // 2, generator=generator) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    double = (t.double() for t in (qkv[:, :H], cos, sin))
    with torch.inference_mode():
        exact = TORCH.rotary_qk_norm(*double, 1e-5)
    result = TRITON.rotary_qk_norm(*(t.to(DEVICE) for t in (qkv[:, :H], cos, sin)), 1e-5)
    check(result, exact, dtype, D)


@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_operators(dtype: torch.dtype) -> None:
    x = (torch.randn(3, 5001, generator=torch.Generator().manual_seed(0)) * 20).to(dtype)
    double = x.double()
    check(TRITON.softcap(x.to(DEVICE), 15.0), 15 * (double / 15).tanh(), torch.float32)
    assert torch.equal(TRITON.softcap(x.to(DEVICE), 0.0).cpu(), x.float())
    check(TRITON.relu_squared(x.to(DEVICE, copy=True)), double.clamp_min(0).square(), dtype)


def test_keys_and_values_are_written_to_their_slots() -> None:
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, 6, 4, generator=generator).to(DEVICE)
    keys, values = torch.zeros((2, 5, 16, 2, 4), device=DEVICE)
    slot_mapping = torch.tensor([17, 0, 79], device=DEVICE)
    store_kv(qkv[:, 2:4], qkv[:, 4:], keys, values, slot_mapping)
    for pages, new in ((keys, qkv[:, 2:4]), (values, qkv[:, 4:])):
        assert torch.equal(pages.flatten(0, 1)[slot_mapping], new)
        assert int((pages != 0).flatten(2).any(dim=-1).sum()) == 3


@pytest.mark.parametrize("store", [store_kv, store_by_index])
def test_fp8_pages_end_at_448(store: Callable[..., None]) -> None:
    keys, values = torch.zeros((2, 3, 16, 1, 4), dtype=torch.float8_e4m3fn, device=DEVICE)
    new = torch.tensor([[[0.1, -1.0, 3.3, 500.0]], [[-1e9, 0.0, 16.5, 448.0]]], device=DEVICE)
    store(new, -new, keys, values, torch.tensor([33, 5], device=DEVICE))
    # 3 bits behind the first one: 0.1015625 is 1.625 / 16, 3.25 is 1.625 · 2; 16 is before 18.
    want = torch.tensor([[0.1015625, -1.0, 3.25, 448.0], [-448.0, 0.0, 16.0, 448.0]])
    for pages, sign in ((keys, 1), (values, -1)):
        lines = pages.float().cpu().flatten(0, 2)
        assert torch.equal(lines[[33, 5]], sign * want)
        assert int((lines != 0).sum()) == 7
