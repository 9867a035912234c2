"""Initial weights: the distribution of each parameter is nanochat's."""

from __future__ import annotations

import math

import pytest
import torch

from nanochat_ray.model.gpt import GPT
from tests.tiny import tiny_config

C, LAYERS = 64, 5
UNIFORM = math.sqrt(3 / C)  # of standard deviation 1 / sqrt(C)


def init(**fields: object) -> dict[str, torch.Tensor]:
    model = GPT(tiny_config(n_embd=C, n_layer=LAYERS, skips=True, attention_gate=True, **fields))
    for p in model.parameters():
        p.data.fill_(math.nan)
    model.init_weights(torch.Generator().manual_seed(0))
    return {name: p.detach() for name, p in model.named_parameters()}


WEIGHTS = init()


@pytest.mark.parametrize(
    ("suffix", "low", "high"),
    [
        ("attn.c_q.weight", -UNIFORM, UNIFORM),
        ("attn.c_k.weight", -UNIFORM, UNIFORM),
        ("attn.c_v.weight", -UNIFORM, UNIFORM),
        ("mlp.c_fc.weight", -0.4 * UNIFORM, 0.4 * UNIFORM),
        ("ve_gate.weight", 0.0, 0.02),
        ("smear_gate.weight", 0.0, 0.02),
    ],
)
def test_uniform_weights(suffix: str, low: float, high: float) -> None:
    tensors = [w for name, w in WEIGHTS.items() if name.endswith(suffix)]
    assert len(tensors) == {"smear_gate.weight": 1, "ve_gate.weight": 3}.get(suffix, LAYERS)
    values = torch.cat([w.flatten() for w in tensors])
    width = high - low
    assert low <= values.min() < low + 0.15 * width
    assert high - 0.15 * width < values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 4 * width / math.sqrt(12 * len(values))


@pytest.mark.parametrize(
    ("prefix", "std"),
    [("transformer.wte.", 0.8), ("lm_head.", 0.001), ("value_embeds.", 1 / math.sqrt(C))],
)
def test_spread_of_tables(prefix: str, std: float) -> None:
    values = torch.cat([w.flatten() for name, w in WEIGHTS.items() if name.startswith(prefix)])
    assert values.std().item() == pytest.approx(std, rel=0.03)
    assert abs(values.mean()) < 4 * std / math.sqrt(len(values))
    normal = prefix != "value_embeds."
    assert (values.abs().max() > 2 * std) == normal  # a uniform has no tail


def test_blocks_begin_as_the_identity() -> None:
    zero = [name for name, w in WEIGHTS.items() if not w.any()]
    golden = [f"transformer.h.{i}.{part}.weight" for i in range(LAYERS)
                for part in ("attn.c_proj", "mlp.c_proj", "attn.head_gate")]  # fmt: skip
    golden += ["smear_lambda", "skip_lambdas", "skip_gates.0.weight", "skip_gates.1.weight"]
    assert sorted(zero) == sorted(golden)


def test_scalars_are_ramps() -> None:
    torch.testing.assert_close(
        WEIGHTS["resid_lambdas"], torch.tensor([1.15, 1.125, 1.1, 1.075, 1.05])
    )
    torch.testing.assert_close(
        WEIGHTS["x0_lambdas"], torch.tensor([0.2, 0.1625, 0.125, 0.0875, 0.05])
    )
    assert WEIGHTS["backout_lambda"].tolist() == [pytest.approx(0.2)]
    assert init(residual_decay=1.25)["resid_lambdas"].tolist() == [1.25] * LAYERS
    for layers, shares in ((1, [0.2]), (2, [0.2, 0.05])):
        model = GPT(tiny_config(n_layer=layers))
        model.init_weights(torch.Generator().manual_seed(0))
        assert model.x0_lambdas.tolist() == pytest.approx(shares)


def test_equal_seeds_give_equal_weights() -> None:
    again = init()
    assert all(torch.equal(w, again[name]) for name, w in WEIGHTS.items())
