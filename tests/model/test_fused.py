"""RMSNorm with and without gradients, against its definition."""

from __future__ import annotations

import pytest
import torch

from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.fused import rms_norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_small_inputs_are_normalised(dtype: torch.dtype, grad: bool) -> None:
    # Mean square 1e-4: far above the epsilon of float32, far below that of bfloat16 (7.8e-3).
    x = torch.full((2, 8), 0.01, dtype=dtype)
    default = ModelConfig.__dataclass_fields__["norm_eps"].default
    with torch.set_grad_enabled(grad):
        y = rms_norm(x, default)
    assert y.float().flatten().tolist() == pytest.approx([1.0] * 16, rel=0.01)


@pytest.mark.parametrize("grad", [True, False])
def test_the_epsilon_is_added_to_the_mean_square(grad: bool) -> None:
    x = torch.tensor([[1.0, -1.0], [3.0, 0.0]])
    with torch.set_grad_enabled(grad):
        y = rms_norm(x, 1.25)
    # sqrt(1 + 1.25) = 1.5 and sqrt(4.5 + 1.25).
    golden = [1 / 1.5, -1 / 1.5, 3 / 5.75**0.5, 0.0]
    assert y.flatten().tolist() == pytest.approx(golden, rel=1e-6)
