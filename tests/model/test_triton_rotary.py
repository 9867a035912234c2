"""Rotary embedding and QK-norm by kernels, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")
from nanochat_ray.model import block
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.rotary import rotary_tables, rotate
from nanochat_ray.model.triton_rotary import rotary_norm
from tests.tiny import tiny_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# The compiler warns of other parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore")


def reference(qkv: Tensor, cos: Tensor, sin: Tensor, H: int, Hkv: int) -> tuple[Tensor, ...]:
    heads = qkv.unflatten(-1, (H + 2 * Hkv, -1))
    q, k, v = heads.split([H, Hkv, Hkv], dim=2)
    angles = cos[None, :, None], sin[None, :, None]
    q, k = (F.rms_norm(rotate(x, *angles), x.shape[-1:], eps=EPS) for x in (q, k))
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("H", "Hkv", "D"), [(2, 2, 8), (5, 1, 12), (6, 3, 16)])
def test_values_and_gradients_equal_float64(H: int, Hkv: int, D: int, dtype: torch.dtype) -> None:
    B, T = 2, 5
    generator = torch.Generator().manual_seed(H)
    cos, sin = (table.to(DEVICE, dtype) for table in rotary_tables(T, D, 100.0))
    qkv = torch.randn(B, T, (H + 2 * Hkv) * D, generator=generator).to(DEVICE, dtype)
    # As attention returns them: heads before positions.
    upstream = [
        torch.randn(B, n, T, D, generator=generator).to(DEVICE, dtype).transpose(1, 2)
        for n in (H, Hkv, Hkv)
    ]
    exact_input = qkv.double().requires_grad_()
    exact = reference(exact_input, cos.double(), sin.double(), H, Hkv)
    torch.autograd.backward(exact, [g.double() for g in upstream])
    qkv.requires_grad_()
    results = rotary_norm(qkv, cos, sin, num_heads=H, eps=EPS)
    torch.autograd.backward(results, upstream)
    eps = torch.finfo(dtype).eps
    for result, value in zip(results, exact, strict=True):
        # Values of at most √D, computed in float32 and rounded once.
        assert (result.double() - value).abs().max() <= 2 * eps * D**0.5
    assert qkv.grad is not None
    assert exact_input.grad is not None
    # The kernel reads q and k rounded: y · mean(g · y) has two rounded factors of at most √D.
    bound = 4 * eps * float(exact_input.grad.abs().max() + D * exact_input.grad.abs().mean())
    assert (qkv.grad.double() - exact_input.grad).abs().max() <= bound


@pytest.mark.parametrize("fields", [{}, {"n_head": 4, "n_kv_head": 2}])
def test_a_model_on_kernels_equals_one_without(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(n_layer=2, sequence_len=16, **fields)
    ids = torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(1), device=DEVICE)
    results = []
    for has_kernels in (False, True):
        monkeypatch.setattr(block, "use_triton", lambda device, on=has_kernels: on)
        model = GPT(config)
        model.init_weights(torch.Generator().manual_seed(0))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02
        model.to(DEVICE)
        if has_kernels:
            model.compile_blocks("aot_eager")
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    for value, exact in zip(*results, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-6)
