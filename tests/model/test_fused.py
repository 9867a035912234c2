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
