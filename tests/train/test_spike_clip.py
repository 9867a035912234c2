"""Gradient-spike clipping: the bound of every step, from the norms of the steps before it."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from torch import Tensor

from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from tests.tiny import tiny_config, write_dataset
from tests.train.run_trainer import run_trainer


@pytest.mark.slow
def test_bound_is_a_multiple_of_the_median(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """None before 50 norms, then 1.5 times the median of the last 100, also after a resume."""
    write_dataset(root, "base", length=8)
    bounds: list[float] = []
    norms: list[float] = []
    step = ShardedOptimizer.step

    def record(self: ShardedOptimizer, *args: Any, clip: float = 0.0, **kwargs: Any) -> Tensor:
        norm = step(self, *args, clip=clip, **kwargs)
        bounds.append(clip)
        norms.append(float(norm))
        return norm

    monkeypatch.setattr(ShardedOptimizer, "step", record)
    train = TrainConfig(
        steps=112,
        global_batch_size=1,
        micro_batch_size=1,
        spike_clip=1.5,
        sample_tokens=0,
        optim=OptimConfig(grad_clip=100.0),
    )
    model = tiny_config(n_layer=1, sequence_len=8)
    job = TrainerConfig(storage=root.uri, dataset="base", run="r", model=model, train=train)
    stops = iter([*[False] * 104, True])
    run_trainer(job, should_stop=lambda: next(stops))
    run_trainer(job)
    assert len(norms) == 112
    assert bounds[:50] == [100.0] * 50
    for at in range(50, 112):
        usual = statistics.median(norms[max(0, at - 100) : at])
        assert bounds[at] == pytest.approx(min(100.0, 1.5 * usual), rel=1e-5), at
    assert max(bounds[50:]) < 100
