"""The update of a GPU, run on a CPU: against the host's, which other tests hold to references."""

from __future__ import annotations

import math

import pytest
import torch

from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim import sharded
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.device_update import DeviceUpdate
from nanochat_ray.optim.sharded import ShardedOptimizer
from tests.optim.test_adamw import random_model, set_gradients

CONFIG = OptimConfig(weight_decay=0.1, embedding_beta2=0.99)


def build(config: OptimConfig, *, on_device: bool) -> tuple[GPT, ShardedOptimizer]:
    model = random_model(skips=True)
    optimizer = ShardedOptimizer(model, config)
    optimizer.device_update = DeviceUpdate(compiles=False) if on_device else None
    return model, optimizer


def state(optimizer: ShardedOptimizer) -> dict[str, torch.Tensor]:
    weights = {f"{i}": flat.weights.clone() for i, flat in enumerate(optimizer.flats)}
    return weights | optimizer.state_dict()


@pytest.mark.parametrize("clip", [0.0, 1.0, 1e6])
@pytest.mark.parametrize("cautious", [False, True])
def test_device_update_equals_the_hosts(clip: float, cautious: bool) -> None:
    config = OptimConfig(weight_decay=0.1, cautious=cautious)
    pairs = [build(config, on_device=on_device) for on_device in (False, True)]
    for step in range(3):
        norms = []
        for model, optimizer in pairs:
            set_gradients(model, step)
            norms.append(
                optimizer.step(
                    step,
                    lr_factor=0.5,
                    momentum=0.9,
                    scale=torch.tensor(0.25, dtype=torch.float64),
                    clip=clip,
                    active=torch.tensor(True),
                )
            )
        torch.testing.assert_close(norms[1].float(), norms[0], rtol=1e-5, atol=0)
    # Clipping is a factor before the update in one and after the scaling in the other: a few
    # roundings each step, which the iteration of Muon multiplies.
    host_state, device_state = (state(optimizer) for _, optimizer in pairs)
    for name, tensor in host_state.items():
        bound = 1e-4 * tensor.abs().max()
        assert (device_state[name] - tensor).abs().max() <= bound, name


@pytest.mark.parametrize(("value", "active"), [(math.nan, True), (math.inf, True), (1.0, False)])
def test_a_step_that_is_off_changes_nothing(value: float, active: bool) -> None:
    model, device = build(CONFIG, on_device=True)
    set_gradients(model, 0)
    device.step(0, lr_factor=1.0, momentum=0.9)
    before = state(device)
    set_gradients(model, 1)
    for flat in device.flats:
        flat.grads[0] = value
    norm = device.step(1, lr_factor=1.0, momentum=0.9, clip=1.0, active=torch.tensor(active))
    assert bool(norm.isfinite()) == math.isfinite(value)
    after = state(device)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_large_tables_reduce_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ShardedOptimizer(random_model(), CONFIG)
    monkeypatch.setattr(sharded, "LARGE_TABLE", 1000)
    model = random_model()
    parts = ShardedOptimizer(model, CONFIG)
    tables = [f.group.names for f in parts.flats if f.group.names[0].startswith("value_embeds")]
    assert tables == [("value_embeds.1.weight",), ("value_embeds.3.weight",)]
    assert parts.state_dict().keys() == whole.state_dict().keys()
    names = [name for flat in parts.flats for name in flat.group.names]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
