"""Linear layers that one matmul computes."""

from __future__ import annotations

import torch

from nanochat_ray.model.linear import Linear, apply_together


def test_layers_together_equal_each_alone() -> None:
    torch.manual_seed(0)
    layers = [Linear(16, outputs) for outputs in (24, 8, 8)]
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    upstream = [torch.randn(2, 3, layer.out_features, dtype=torch.float64) for layer in layers]
    results = []
    together_outputs = apply_together(x, layers).split([24, 8, 8], -1)
    for outputs in (together_outputs, [layer(x) for layer in layers]):
        assert [y.shape for y in outputs] == [g.shape for g in upstream]
        inputs = [x, *(layer.weight for layer in layers)]
        loss = sum((y * g).sum() for y, g in zip(outputs, upstream, strict=True))
        results.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for together, alone in zip(*results, strict=True):
        # Sums of at most 40 products; gradients of weights are rounded to float32.
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_fp8_of_the_first_holds_for_all(fp8_on_any_cpu: None) -> None:
    layers = [Linear(16, 16) for _ in range(2)]
    x = torch.randn(16, 16, dtype=torch.bfloat16)
    exact = apply_together(x, layers)
    for layer in layers:
        layer.fp8 = True
    in_fp8 = apply_together(x, layers)
    assert not torch.equal(in_fp8, exact)
    # e4m3 has 3 bits behind the point.
    assert (in_fp8 - exact).norm() / exact.norm() < 2.0**-3
