"""What a checkpoint in the making holds, and the figures of a run's checkpoints."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.storage import Store
from nanochat_ray.train import checkpointer as checkpointer_module
from nanochat_ray.train.checkpoint_writer import PendingCheckpoint
from nanochat_ray.train.checkpointer import Checkpointer
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.metrics import Metrics
from nanochat_ray.train.ranks import Ranks
from tests.tiny import TOKENIZER, tiny_config


def make(root: Store, **fields: Any) -> Checkpointer:
    model = GPT(tiny_config())
    return Checkpointer(
        root.child("runs", "r"),
        TrainConfig(steps=9, global_batch_size=1, micro_batch_size=1, **fields),
        TOKENIZER,
        model,
        ShardedOptimizer(model, OptimConfig()),
        Ranks(),
        about={"data": "x"},
        hardware={"workers": 1},
    )


def record(metrics: Metrics, step: int) -> None:
    metrics.add(kind="save", step=step, stall=0.5)


def test_a_checkpoint_is_of_its_step(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is written when training is steps ahead."""
    one, metrics = make(root), Metrics()
    puts: list[PendingCheckpoint] = []
    monkeypatch.setattr(one.writer, "put", puts.append)
    record(metrics, 3)
    head = one.model.lm_head.weight.detach().clone()
    one.save(3, metrics, 0.0)
    record(metrics, 4)
    with torch.no_grad():
        one.model.lm_head.weight += 1
        for flat in one.optimizer.flats:
            flat.state["momentum"] += 1
    puts[0].write()
    latest = checkpoint.load(one.store, optimizer=True)
    assert (latest.name, latest.trainer["step"], latest.trainer["about"]) == (
        "step-000003",
        3,
        {"data": "x"},
    )
    assert torch.equal(latest.weights["lm_head.weight"], head)
    assert latest.optimizer is not None
    assert not any(tensor.any() for tensor in latest.optimizer.values())
    lines = one.store.read_text("metrics.jsonl").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3]
    assert checkpoint.val_metric(one.store, latest.name) == 0.0
    one.save(4, metrics, None)
    assert [pending.is_validated for pending in puts] == [True, False]


def test_the_wait_at_the_end_is_in_seconds(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make(root, save_timeout_s=7.5)
    limits: list[float] = []
    monkeypatch.setattr(one.writer, "await_end", limits.append)
    one.wait()
    assert limits == [7.5]


def test_figures_by_hand(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(checkpointer_module.time, "time", lambda: now)
    one = make(root)
    now = 160.0
    assert one.figures() == {"checkpoint_age": 60.0, "save_pending": 0.0, "save_delay": 0.0}
    one.writer.last_time = 150.0
    assert one.figures()["checkpoint_age"] == 10.0
    one.ranks.rank = 1
    assert one.figures() == {}
