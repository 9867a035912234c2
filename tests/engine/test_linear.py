"""The layouts of linear layers: equal values, and the rows from which on they do not change."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.engine.linear import faster, fewest_rows, pack_weights
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.layers import Linear
from tests.tiny import tiny_config


def layer(inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> Linear:
    made = Linear(inputs, outputs).to(dtype).requires_grad_(False)
    made.weight.copy_(torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1)))
    return made


@pytest.mark.parametrize("outputs", [1, 6, 40, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_faster_layer_computes_the_same(outputs: int, dtype: torch.dtype) -> None:
    plain, x = layer(96, outputs, dtype), torch.randn((5, 96)).to(dtype)
    expected = F.linear(x.double(), plain.weight.double())
    torch.testing.assert_close(faster(plain)(x).double(), expected, atol=0.2, rtol=2e-2)


def test_rows_that_hang_on_their_number_are_found() -> None:
    class Fickle(Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + (len(x) < self.steady)

        steady = 0

    for steady, expected in ((2, 2), (3, 4), (4, 4), (17, None)):
        fickle = Fickle(8, 8).requires_grad_(False)
        fickle.weight.zero_()
        fickle.steady = steady
        assert fewest_rows(fickle, torch.float32) == expected


def test_a_model_may_be_laid_out_twice() -> None:
    model = GPT(tiny_config()).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.arange(12).view(1, 12)
    with torch.inference_mode():
        before = model(ids)
        assert pack_weights(model) == pack_weights(model) <= 4
        torch.testing.assert_close(model(ids), before)
