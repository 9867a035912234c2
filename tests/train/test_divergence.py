"""What the guard lets pass, and what it stops."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.divergence import DivergenceGuard
from nanochat_ray.train.metrics import Metrics
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.step import Batch, RankVotes, StepResult
from tests.tiny import tiny_config

CONFIG = TrainConfig(steps=9, global_batch_size=4, micro_batch_size=2, spike_clip=3.0)
BATCH = Batch(np.arange(36, dtype=np.uint16).reshape(4, 9))


def result(grad_norm: float) -> StepResult:
    return StepResult(
        loss=2.0,
        grad_norm=grad_norm,
        trained_tokens=5,
        lr_factor=1.0,
        weights_updated=math.isfinite(grad_norm),
        votes=RankVotes(),
        tokens=8,
    )


@pytest.fixture
def guard(root: Store) -> DivergenceGuard:
    model = GPT(tiny_config(dropout=0.5))
    model.init_weights(torch.Generator().manual_seed(0))
    return DivergenceGuard(model.train(), CONFIG, Metrics(), Ranks(), root)


def add_norms(guard: DivergenceGuard, norms: list[float]) -> None:
    for step, norm in enumerate(norms):
        guard.metrics.step(step, result(norm), seconds=1.0, data_wait=0.0)


def test_the_bound_of_spikes_is_a_median(guard: DivergenceGuard) -> None:
    add_norms(guard, [1.0] * 49)
    assert guard.spike_bound() == 0  # too few to know what is usual
    add_norms(guard, [9.0])
    assert guard.spike_bound() == 3.0
    add_norms(guard, [5.0] * 50)  # of the last hundred 49, 1 and 50: the median is between 5 and 9
    assert guard.spike_bound() == 3 * 5.0
    guard.config = dataclasses.replace(CONFIG, spike_clip=0.0)
    assert guard.spike_bound() == 0


def test_five_steps_in_a_row_end_a_run(guard: DivergenceGuard) -> None:
    for step in range(1, 5):
        guard.check_step(step, result(math.nan))
    guard.check_step(5, result(1.0))
    assert guard.skipped_steps == 0
    for step in range(6, 10):
        guard.check_step(step, result(math.inf))
    assert guard.skipped_steps == 4
    with pytest.raises(FloatingPointError, match=r"not finite in 5 steps up to step 10 .*no earl"):
        guard.check_step(10, result(math.nan))


@pytest.mark.parametrize(
    ("loss", "metric", "name"),
    [
        (math.nan, 1.0, "its training loss is nan"),
        (math.inf, None, "its training loss is inf"),
        (1.0, math.nan, "its validation is nan"),
    ],
)
def test_what_is_not_finite_is_not_saved(
    guard: DivergenceGuard, loss: float, metric: float | None, name: str
) -> None:
    with pytest.raises(FloatingPointError, match=f"diverged at step 7: {name}"):
        guard.check_weights(7, loss, metric, BATCH)


def test_weights_are_tried_without_validation(guard: DivergenceGuard) -> None:
    """One forward pass of the first micro-batch, without dropout and without gradients."""
    losses = {guard._forward_loss(BATCH) for _ in range(2)}
    ids = torch.from_numpy(BATCH.ids[:2].astype(np.int64))
    with torch.no_grad():
        golden = guard.model.eval().loss(ids[:, :-1], ids[:, 1:].contiguous(), "sum").item()
    assert losses == {golden}
    guard.model.train()
    guard._forward_loss(BATCH)
    assert guard.model.training
    empty = Batch(np.zeros((0, 9), dtype=np.uint16))
    assert guard._forward_loss(empty) == 0
    guard.check_weights(7, 1.0, None, BATCH)
    guard.model.lm_head.weight.data.fill_(math.nan)
    guard.check_weights(7, 1.0, None, empty)  # left as they were
    with pytest.raises(FloatingPointError, match="its training loss after it is nan"):
        guard.check_weights(7, 1.0, None, BATCH)
    guard.check_weights(7, 1.0, 0.5, BATCH)  # a validation has used the weights
