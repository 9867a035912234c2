"""Numerics by equalities: how rows are cut or spread, and where a run stops, must not matter."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny import free_ports, tiny_config, write_dataset

from nanochat_ray.checkpoint import snapshot
from nanochat_ray.config import OptimConfig, TrainConfig
from nanochat_ray.storage import Store
from nanochat_ray.train.job import TrainJob, execute

CONFIG = TrainConfig(
    steps=8,
    batch_rows=8,
    micro_rows=4,
    eval_every=4,
    eval_rows=8,
    save_every=3,
    optim=OptimConfig(
        matrix_lr=0.005, embedding_lr=0.05, scalar_lr=0.05, weight_decay=0.1, grad_clip=1.0
    ),
)


def job(root: Store, run: str, stage: str = "base", **changes: Any) -> TrainJob:
    train = dataclasses.replace(CONFIG, stage=stage, **changes)
    return TrainJob(storage=root.uri, dataset=stage, run=run, model=tiny_config(), train=train)


def losses(job: TrainJob, **kwargs: Any) -> list[float]:
    found: list[float] = []
    execute(
        job, report=lambda r: found.append(r["loss"]) if r["kind"] == "train" else None, **kwargs
    )
    return found


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_accumulation_equals_one_big_micro_batch(root: Store, stage: str) -> None:
    write_dataset(root, stage, stage)
    one = losses(job(root, "one", stage, micro_rows=8, steps=4))
    four = losses(job(root, "four", stage, micro_rows=2, steps=4))
    assert one == pytest.approx(four, abs=1e-5)
    assert one[-1] < one[0]


def _rank(rank: int, world: int, port: int, values: dict[str, Any], out: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    found = losses(TrainJob.from_json(values), rank=rank, world=world)
    out.with_suffix(f".{rank}").write_text(repr(found))
    dist.destroy_process_group()


def on_ranks(world: int, job: TrainJob, out: Path) -> list[list[float]]:
    context, (port,) = multiprocessing.get_context("spawn"), free_ports(1)
    ranks = [
        context.Process(target=_rank, args=(rank, world, port, job.to_json(), out))
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    return [eval(out.with_suffix(f".{rank}").read_text()) for rank in range(world)]


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_two_ranks_equal_one(root: Store, tmp_path: Path, stage: str) -> None:
    write_dataset(root, stage, stage)
    alone = losses(job(root, "alone", stage))
    both = on_ranks(2, job(root, "both", stage), tmp_path / "losses")
    assert both[0] == both[1]
    assert both[0] == pytest.approx(alone, abs=1e-5)
    one, two = (snapshot.load(root.child("runs", r), optimizer=True) for r in ("alone", "both"))
    for name, weight in one.weights.items():
        torch.testing.assert_close(two.weights[name], weight, atol=2e-4, rtol=1e-3)
    assert one.optimizer is not None
    assert two.optimizer is not None
    assert one.optimizer.keys() == two.optimizer.keys()


@pytest.mark.parametrize("stop", [1, 3, 5, 7])
def test_resumed_equals_uninterrupted_bit_for_bit(root: Store, stop: int) -> None:
    write_dataset(root, "base")
    execute(job(root, "whole"))
    steps = 0

    def should_stop() -> bool:
        nonlocal steps
        steps += 1
        return steps == stop

    half = execute(job(root, "halves"), should_stop=should_stop)
    assert half["step"] == stop
    assert not half["done"]
    done = execute(job(root, "halves"))
    assert done["done"]
    whole, halves = (
        snapshot.load(root.child("runs", run), optimizer=True) for run in ("whole", "halves")
    )
    assert whole.optimizer is not None
    assert halves.optimizer is not None
    for name, weight in whole.weights.items():
        assert torch.equal(weight, halves.weights[name]), name
    for name, state in whole.optimizer.items():
        assert torch.equal(state, halves.optimizer[name]), name


def test_a_run_stopped_by_two_ranks_goes_on_with_one(root: Store, tmp_path: Path) -> None:
    write_dataset(root, "base")
    alone = losses(job(root, "alone"))
    short = job(root, "moved")
    on_ranks(2, short, tmp_path / "losses")
    run = root.child("runs", "moved")
    run.write_text("latest", "step-000006")  # as if it had been stopped there
    assert losses(short) == pytest.approx(alone[6:], abs=1e-5)


def test_another_configuration_is_refused(root: Store) -> None:
    write_dataset(root, "base")
    execute(job(root, "run", steps=2))
    with pytest.raises(ValueError, match=r"batch_rows=4 is not what this run was started with"):
        execute(job(root, "run", steps=2, batch_rows=4))


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanochat_ray.model.gpt import GPT

    write_dataset(root, "base")
    real, calls = GPT.loss, 0

    def poisoned(self: GPT, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += self.training
        found = real(self, *args, **kwargs)
        return found * float("nan") if self.training and calls > 7 else found

    monkeypatch.setattr(GPT, "loss", poisoned)
    with pytest.raises(FloatingPointError, match="not finite in 5 steps"):
        execute(job(root, "run", steps=20, save_every=1))
    saved = snapshot.load(root.child("runs", "run"), optimizer=True)
    assert saved.step == 3
    assert all(torch.isfinite(weight).all() for weight in saved.weights.values())
