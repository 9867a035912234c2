"""Batches from groups of known answers, by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from nanochat_ray.rl.batch import make_batch
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.figures import step_figures
from nanochat_ray.rl.questions import Question
from nanochat_ray.rl.rollout import Group, Rollout
from nanochat_ray.train.step import Batch

A = Rollout([3, 4], [-1.0, -2.0], "stop", 0)
B = Rollout([5, 6, 7], [-0.5, None, -1.5], "length", 0)  # a tool has injected the 6
C = Rollout([9], [-0.25], "stop", 0)
D = Rollout([11], [-3.0], "stop", 0)
E = Rollout([12, 13], [-0.75, -4.0], "stop", 0)
GROUPS = [
    Group(Question(0, 5), [1, 2], [A, A, B], [1.0, 1.0, 0.0]),
    Group(Question(1, 0), [8], [C, C, C], [0.0, 0.0, 0.0]),
    Group(Question(1, 1), [8, 9, 10], [D, E, D], [0.0, 1.0, 0.0]),
]
CONFIG = RLConfig(tasks=("a", "b", "c"), loss="grpo", max_tokens=10)


def batch(micro_batch_size: int, rank: int = 0, world: int = 1, loss: str = "grpo") -> Batch:
    config = dataclasses.replace(CONFIG, loss=loss)  # type: ignore[arg-type]
    return make_batch(GROUPS, config, micro_batch_size=micro_batch_size, rank=rank, world=world)


def test_sequences_by_hand() -> None:
    """Distinct answers by length, the group without signal left out."""
    b = batch(4)
    assert b.ids.tolist() == [
        [1, 2, 3, 4, 0],
        [8, 9, 10, 11, 0],
        [1, 2, 5, 6, 7],
        [8, 9, 10, 12, 13],
    ]
    assert b.mask is not None
    assert b.mask.tolist() == [
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 1, 0, 1],
        [0, 0, 0, 1, 1],
    ]
    assert b.token_inputs["logprobs"].tolist() == [
        [0, 0, -1, -2, 0],
        [0, 0, 0, -3, 0],
        [0, 0, -0.5, 0, -1.5],
        [0, 0, 0, -0.75, -4],
    ]
    # Samples of the answer over its sampled tokens: 2 / 2, 2 / 1, 1 / 2, 1 / 2.
    assert b.token_inputs["weights"].max(axis=1).tolist() == [1.0, 2.0, 0.5, 0.5]
    # Rewards deviate by 1/3 and 2/3 from the mean; their deviation is sqrt(1 / 3).
    std = math.sqrt(1 / 3)
    assert b.token_inputs["advantages"].sum(axis=1) / b.mask.sum(axis=1) == pytest.approx(
        [1 / 3 / std, -1 / 3 / std, -2 / 3 / std, 2 / 3 / std], rel=1e-5
    )
    for values in b.token_inputs.values():
        assert values.dtype == np.float32
        assert not values[b.mask == 0].any()


@pytest.mark.parametrize(
    ("loss", "weights", "denominator"),
    # Six answers of 2, 2, 2, 1, 1, 2 sampled tokens.
    [("grpo", [1.0, 2.0, 0.5, 0.5], 6), ("dapo", [2, 2, 1, 1], 10), ("dr_grpo", [2, 2, 1, 1], 60)],
)
def test_weights_and_denominators(loss: str, weights: list[float], denominator: float) -> None:
    b = batch(4, loss=loss)
    assert b.token_inputs["weights"].max(axis=1).tolist() == weights
    assert b.denominator == denominator


@pytest.mark.parametrize(
    ("micro_batch_size", "world", "shares"),
    # Whole micro-batches for each rank, as long as there are any.
    [(1, 2, [2, 2]), (3, 2, [3, 1]), (1, 3, [2, 2, 0]), (4, 2, [4, 0])],
)
def test_ranks_share_whole_micro_batches(
    micro_batch_size: int, world: int, shares: list[int]
) -> None:
    ranks = [batch(micro_batch_size, rank, world) for rank in range(world)]
    assert [len(b.ids) for b in ranks] == shares
    assert np.array_equal(np.concatenate([b.ids for b in ranks]), batch(4).ids)
    assert {b.denominator for b in ranks} == {6.0}
    assert all(b.metrics == ranks[0].metrics for b in ranks)


def test_groups_without_signal_give_an_empty_batch() -> None:
    b = make_batch(GROUPS[1:2], CONFIG, micro_batch_size=4, rank=0, world=1)
    assert b.ids.shape == (0, 2)
    assert b.denominator == 1
    assert b.metrics == {"sequences": 0}


def test_figures_by_hand() -> None:
    assert step_figures(GROUPS, CONFIG.tasks, 0.5) == {
        "reward": pytest.approx((2 / 3 + 0 + 1 / 3) / 3),
        "groups": 3,
        "groups_with_signal": 2,
        "answer_tokens": pytest.approx((7 + 3 + 4) / 9),
        "truncated_share": pytest.approx(1 / 9),
        "entropy": pytest.approx((3 + 3 + 2 + 0.75 + 3 + 4.75 + 3) / 13),
        "rollout_seconds": 0.5,
        "rollout_tokens_per_s": 28.0,
        "reward/a": pytest.approx(2 / 3),
        "reward/b": pytest.approx(1 / 6),  # of c nothing was asked
    }
