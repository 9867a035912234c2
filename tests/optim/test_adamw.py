"""AdamW against torch.optim.AdamW, and what a step does before it: scaling and clipping."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch

from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim import flat
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.groups import build_groups
from nanochat_ray.optim.muon import MuonRule
from nanochat_ray.optim.sharded import ShardedOptimizer
from tests.tiny import tiny_config

CONFIG = OptimConfig(
    matrix_lr=0.02,
    embedding_lr=0.3,
    unembedding_lr=0.008,
    scalar_lr=0.5,
    weight_decay=0.1,
    embedding_beta2=0.99,
    momentum=0.9,
)
# Start of the name: learning rate, betas and weight decay of nanochat (gpt.py, setup_optimizer,
# July 2026) for the rates above. The second beta of the embeddings is the configuration's.
ADAMW = {
    "lm_head.": (0.008, (0.8, 0.96), 0.01),
    "transformer.wte.": (0.3, (0.8, 0.99), 0.001),
    "value_embeds.": (0.15, (0.8, 0.99), 0.01),
    "resid_lambdas": (0.005, (0.8, 0.95), 0.05),
    "x0_lambdas": (0.5, (0.96, 0.95), 0.0),
    "smear_": (0.2, (0.8, 0.95), 0.0),
    "backout_lambda": (0.2, (0.8, 0.95), 0.0),
    "skip_": (0.05, (0.8, 0.95), 0.0),
    "transformer.h.0.attn.head_gate": (0.05, (0.8, 0.95), 0.0),
}


def random_model(**fields: object) -> GPT:
    model = GPT(tiny_config(n_layer=4, **fields))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def set_gradients(model: GPT, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("prefix", ADAMW)
def test_adamw_is_torchs(prefix: str) -> None:
    model = random_model(skips=True, attention_gate=True)
    optimizer = ShardedOptimizer(model, CONFIG)
    lr, betas, decay = ADAMW[prefix]
    pairs = [
        (ours, torch.nn.Parameter(ours.detach().clone()))
        for name, ours in model.named_parameters()
        if name.startswith(prefix)
    ]
    assert pairs
    reference = torch.optim.AdamW(
        [theirs for _, theirs in pairs], lr=lr, betas=betas, eps=1e-10, weight_decay=decay
    )
    for step, factor in enumerate((0.5, 1.0, 1.0, 0.25)):
        set_gradients(model, step)
        for ours, theirs in pairs:
            assert ours.grad is not None
            theirs.grad = ours.grad.clone()
        reference.param_groups[0]["lr"] = lr * factor
        reference.step()
        optimizer.step(step, lr_factor=factor, momentum=0.9)
        for ours, theirs in pairs:
            torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_matrices_have_their_group() -> None:
    model = random_model()
    groups = {n: flat.group for flat in ShardedOptimizer(model, CONFIG).flats
              for n in flat.group.names}  # fmt: skip
    assert set(groups) == {name for name, _ in model.named_parameters()}
    for name, group in groups.items():
        assert (group.kind == "muon") == name.startswith("transformer.h."), name
        if group.kind == "muon":
            assert (group.lr, group.weight_decay, group.beta1, group.beta2) == (0.02, 0.1, 0.9, 0.9)
        assert group.eps == 1e-10


@pytest.mark.parametrize("name", ["sinks", "transformer.h.0.attn.sinks"])
def test_a_parameter_without_a_rule_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"parameter '{name}' has no learning rate; see optim"):
        build_groups([(name, torch.nn.Parameter(torch.zeros(4)))], CONFIG)


@pytest.mark.parametrize("scale", [0.5, 0.001])
@pytest.mark.parametrize(("clip", "share"), [(0.0, 1.0), (0.25, 0.25), (4.0, 1.0)])
def test_gradient_is_scaled_then_clipped(clip: float, share: float, scale: float) -> None:
    """``clip`` in units of the norm; the first moments say what gradient has arrived."""
    model = random_model()
    optimizer = ShardedOptimizer(model, CONFIG)
    set_gradients(model, 7)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    norm = scale * math.sqrt(sum(grad.double().square().sum().item() for grad in before.values()))
    total_norm = optimizer.step(0, lr_factor=1.0, momentum=0.75, scale=scale, clip=clip * norm)
    assert total_norm.item() == pytest.approx(norm, rel=1e-6)
    state = optimizer.state_dict()
    for name, beta in (("lm_head.weight", 0.8), ("transformer.h.1.mlp.c_fc.weight", 0.75)):
        moment = (1 - beta) * scale * share * before[name]
        torch.testing.assert_close(state[f"{name}/momentum"], moment, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_gradient_that_is_not_finite_moves_nothing(value: float) -> None:
    model = random_model()
    optimizer = ShardedOptimizer(model, CONFIG)
    set_gradients(model, 1)
    model.lm_head.weight.grad[3, 4] = value
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert not optimizer.step(0, lr_factor=1.0, momentum=0.9, clip=1.0).isfinite()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert not any(state.any() for state in optimizer.state_dict().values())


def test_what_a_muon_step_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate and the decay follow the schedule, so the decay of a weight by its square."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(flat, "muon_update_", lambda *tensors, **values: calls.append(values))
    config = dataclasses.replace(
        CONFIG, orthogonalizer="newton_schulz", normuon=False, row_normalize=True, cautious=True
    )
    model = random_model()
    optimizer = ShardedOptimizer(model, config, torch.bfloat16)
    optimizer.step(3, lr_factor=0.25, momentum=0.875)
    assert len(calls) == sum(flat.group.kind == "muon" for flat in optimizer.flats)
    rule = MuonRule(
        orthogonalizer="newton_schulz", normuon=False, row_normalize=True, cautious=True
    )
    for call in calls:
        assert call == {
            "lr": 0.02 * 0.25,
            "momentum": 0.875,
            "beta2": 0.9,
            "weight_decay": 0.1 * 0.25,
            "rule": rule,
            "dtype": torch.bfloat16,
        }
