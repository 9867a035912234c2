"""The optimizer's state by parameter name: what comes back, and what fits no model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nanochat_ray.optim import sharded
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.groups import build_groups
from nanochat_ray.optim.sharded import ShardedOptimizer
from tests.optim.test_adamw import random_model, set_gradients

CONFIG = OptimConfig(weight_decay=0.1)
MATRIX, HEAD = "transformer.h.1.mlp.c_fc.weight", "lm_head.weight"


def test_state_comes_back() -> None:
    model = random_model()
    optimizer = ShardedOptimizer(model, CONFIG)
    set_gradients(model, 1)
    optimizer.step(0, lr_factor=1.0, momentum=0.9)
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    # By default the gradient is neither scaled nor clipped.
    assert model.lm_head.weight.grad is not None
    torch.testing.assert_close(state[f"{HEAD}/momentum"], 0.2 * model.lm_head.weight.grad)
    # Of m × n, m at least n, the second moment has one entry for each row.
    assert state[f"{MATRIX}/momentum"].shape == (128, 32)
    assert state[f"{MATRIX}/second_moment"].shape == (128, 1)
    assert state["transformer.h.1.mlp.c_proj.weight/second_moment"].shape == (1, 128)
    assert state[f"{HEAD}/second_moment"].shape == model.lm_head.weight.shape
    names = {name for name, _ in model.named_parameters()}
    assert state.keys() == {f"{n}/{kind}" for n in names for kind in ("momentum", "second_moment")}
    other = ShardedOptimizer(random_model(), CONFIG)
    assert not any(tensor.any() for tensor in other.state_dict().values())
    other.load_state_dict(state)
    again = other.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in state.items())
    assert other.state_dict(on_rank=0).keys() == state.keys()
    assert other.state_dict(on_rank=1) == {}


def test_ranks_load_their_shares_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ShardedOptimizer(random_model(), CONFIG).state_dict()
    state = {name: torch.randn(tensor.shape) for name, tensor in shapes.items()}
    for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_backend", "gloo")):
        monkeypatch.setattr(sharded.dist, name, lambda value=value: value)
    broadcasts: list[list[torch.Tensor]] = [[], []]

    def broadcast(tensor: torch.Tensor, src: int) -> None:
        rank = sharded.dist.get_rank()
        assert src == 0
        broadcasts[rank].append(tensor.clone())
        tensor.copy_(broadcasts[0][len(broadcasts[rank]) - 1])

    monkeypatch.setattr(sharded.dist, "broadcast", broadcast)
    optimizers: list[ShardedOptimizer] = []
    for rank in range(2):
        monkeypatch.setattr(sharded.dist, "get_rank", lambda rank=rank: rank)
        optimizers.append(ShardedOptimizer(random_model(), CONFIG))
        optimizers[rank].load_state_dict({} if rank else state)
    for flats in zip(*(optimizer.flats for optimizer in optimizers), strict=True):
        for kind in ("momentum", "second_moment"):
            whole = torch.cat([flat.state[kind] for flat in flats])
            for span in flats[0].spans:
                start, stop, _ = flats[0].state_sizes(span)[kind]
                tensor = state[f"{span.name}/{kind}"]
                assert torch.equal(whole[start:stop], tensor.flatten())


def test_state_that_does_not_fit_is_named() -> None:
    optimizer = ShardedOptimizer(random_model(), CONFIG)
    state = optimizer.state_dict()
    missing = {name: t for name, t in state.items() if name != f"{HEAD}/momentum"}
    with pytest.raises(ValueError, match=r"state lm_head\.weight/momentum: .* found nothing"):
        optimizer.check_state_dict(missing)
    flat = {**state, f"{MATRIX}/momentum": torch.zeros(32, 128)}
    with pytest.raises(ValueError, match=r"expected \(128, 32\), found \(32, 128\)"):
        optimizer.check_state_dict(flat)
    with pytest.raises(ValueError, match="'other/momentum' belongs to no parameter"):
        optimizer.check_state_dict({**state, "other/momentum": torch.zeros(1)})


def test_a_parameter_without_rule_is_named() -> None:
    with pytest.raises(ValueError, match="parameter 'extra' has no learning rate"):
        build_groups([("extra", nn.Parameter(torch.zeros(3)))], CONFIG)
