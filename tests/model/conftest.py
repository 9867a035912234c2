"""What several tests of the model need of the machine."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def fp8_on_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN multiplies fp8 on few CPUs: elsewhere by the definition of ``_scaled_mm``."""
    one = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scale = torch.ones(())
    try:
        torch._scaled_mm(one, one.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16)
    except RuntimeError:

        def product(
            a: torch.Tensor,
            b: torch.Tensor,
            *,
            scale_a: torch.Tensor,
            scale_b: torch.Tensor,
            out_dtype: torch.dtype,
            use_fast_accum: bool,
        ) -> torch.Tensor:
            return (a.float() * scale_a @ (b.float() * scale_b)).to(out_dtype)

        monkeypatch.setattr(torch, "_scaled_mm", product)
