"""More ranks than a group has matrices: the first ones own one each, and nothing is padded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.sharded import ShardedOptimizer
from tests.optim.test_buckets import flat_group
from tests.processes import run_on_ranks
from tests.tiny import tiny_config

CONFIG = OptimConfig(matrix_lr=0.02, embedding_lr=0.1, scalar_lr=0.1, weight_decay=0.1)
WORLD, STEPS = 3, 2


@pytest.mark.parametrize(
    ("rank", "share", "sizes"), [(0, (0, 6), (6, 3)), (1, (6, 12), (6, 3)), (2, (12, 12), (0, 0))]
)
def test_shares_by_hand(rank: int, share: tuple[int, int], sizes: tuple[int, int]) -> None:
    """Two of 2 × 3 on four ranks."""
    flat = flat_group("muon", [(2, 3)] * 2, rank, 4)
    assert flat.weights.tolist() == [0.0] * 6 + [1.0] * 6
    assert (flat.own_share.start, flat.own_share.stop) == share
    assert (len(flat.state["momentum"]), len(flat.state["second_moment"])) == sizes
    assert [bucket.owner for bucket in flat.buckets()] == [0, 1]


def _train(rank: int | None, scatters: bool = False) -> dict[str, torch.Tensor]:
    """Weights and state after steps whose gradients rank 0, or the only process, has."""
    torch.manual_seed(rank or 0)  # rank 0 sends its weights to the others
    model = GPT(tiny_config(n_layer=2))
    optimizer = ShardedOptimizer(model, CONFIG)
    optimizer._scatters = scatters
    for step in range(STEPS):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters() if not rank else ():
            assert parameter.grad is not None
            parameter.grad.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.step(step, lr_factor=0.5, momentum=0.9, scale=0.5, clip=10.0)
        optimizer.load_state_dict(optimizer.state_dict())
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return weights | optimizer.state_dict()


def _check(rank: int, file: Path) -> None:
    reference: dict[str, Any] = torch.load(file)
    for scatters in (False, True):  # by all-reduce, and by the calls that are made on GPUs
        actual = _train(rank, scatters)
        assert actual.keys() == reference.keys()
        for name, tensor in reference.items():
            torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_more_ranks_than_matrices_equal_one(tmp_path: Path) -> None:
    reference = _train(None)
    torch.save(reference, tmp_path / "reference")
    run_on_ranks(_check, tmp_path / "reference", world=WORLD)
