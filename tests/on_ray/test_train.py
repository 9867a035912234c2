"""Ray Train and Ray Data around the loop: the same losses, and a run that no dead worker hurts."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nanochat_ray.bench.drill import matches
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from tests.tiny import tiny_config, write_dataset
from tests.train.run_trainer import ENDLESS, run_trainer, stop_after
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]

CONFIG = TrainConfig(
    steps=12,
    global_batch_size=8,
    micro_batch_size=4,
    eval_sequences=8,
    save_every=4,
    sample_tokens=4,
    optim=OptimConfig(matrix_lr=0.002, embedding_lr=0.05, scalar_lr=0.05, warmup_ratio=0.0),
)


def job(storage: str, run: str, **changes: Any) -> TrainerConfig:
    train = dataclasses.replace(CONFIG, **changes)
    return TrainerConfig(storage=storage, dataset="base", run=run, model=tiny_config(), train=train)


def losses(root: Store, run: str) -> list[float]:
    text = root.child("runs", run).read_text("metrics.jsonl")
    records = [json.loads(line) for line in text.splitlines()]
    return [r["loss"] for r in records if r["kind"] == "train"]


def weights(root: Store, run: str) -> dict[str, torch.Tensor]:
    return checkpoint.load(root.child("runs", run), optimizer=False).weights


def test_two_workers_on_s3_equal_one_process(s3: str, tmp_path: Path) -> None:
    from nanochat_ray.on_ray.train import fit

    root, local = Store.at(s3).child("train"), Store.at(str(tmp_path))
    for store in (root, local):
        write_dataset(store, "base", rows=30)  # more than one epoch
    result = fit(job(root.uri, "two"), workers=2, cpus_per_worker=0.5)
    run_trainer(job(local.uri, "one"))
    assert result["done"]
    assert losses(root, "two") == pytest.approx(losses(local, "one"), abs=1e-5)
    assert result["bits_per_byte"] < result["first_bits_per_byte"]
    again = fit(job(root.uri, "two"), workers=2, cpus_per_worker=0.5)
    assert (again["step"], again["loss"]) == (12, result["loss"])


@contextlib.contextmanager
def during(work: Callable[[], None]) -> Iterator[None]:
    """Does ``work`` in a thread beside the block; then Ctrl-C, which the block has to end by."""
    has_ended = threading.Event()

    def work_and_interrupt() -> None:
        try:
            work()
        finally:
            if not has_ended.is_set():
                os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work_and_interrupt)
        try:
            yield
        finally:
            has_ended.set()
        future.result()


def worker_processes() -> list[psutil.Process]:
    """Of the tests' Ray."""
    processes = psutil.Process().children(recursive=True)
    return [process for process in processes if matches(process, "ray::.*RayTrainWorker")]


@pytest.mark.timeout(600)
def test_killed_worker_changes_no_weights(tmp_path: Path) -> None:
    from nanochat_ray.on_ray.train import fit

    root = Store.at(str(tmp_path))
    write_dataset(root, "base")
    victim, whole = (job(root.uri, run, steps=ENDLESS) for run in ("killed", "whole"))
    run = root.child("runs", "killed")
    victims: list[psutil.Process] = []

    def kill() -> None:
        wait_for(lambda: checkpoint.latest(run) is not None, 120, "a first checkpoint")
        victims.extend(worker_processes())
        victims[0].kill()
        wait_for(lambda: set(worker_processes()) - set(victims), 120, "another worker")
        latest = checkpoint.latest(run)
        wait_for(lambda: checkpoint.latest(run) != latest, 120, "a checkpoint of its own")

    with during(kill):
        result = fit(victim, workers=1, cpus_per_worker=0.5)
    assert len(victims) == 1
    assert not result["done"]
    run_trainer(whole, should_stop=stop_after(result["step"]))
    one, other = weights(root, "whole"), weights(root, "killed")
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.timeout(600)
def test_stopped_run_resumes_on_fewer_workers(tmp_path: Path) -> None:
    from nanochat_ray.on_ray import train as on_ray

    root = Store.at(str(tmp_path))
    write_dataset(root, "base")
    one, whole = (job(root.uri, run, steps=ENDLESS) for run in ("stopped", "whole"))
    run, latest = root.child("runs", "stopped"), None

    def send(number: signal.Signals) -> None:
        wait_for(lambda: checkpoint.latest(run) != latest, 180, "another checkpoint")
        os.kill(os.getpid(), number)

    # Ctrl-C, and what ``ray job stop`` sends to the driver.
    for workers, number in ((2, signal.SIGINT), (1, signal.SIGTERM)):
        thread = threading.Thread(target=send, args=(number,))
        thread.start()
        result = on_ray.fit(one, workers=workers, cpus_per_worker=0.5)
        thread.join()
        assert not result["done"]
        assert checkpoint.latest(run) == checkpoint.name_of(result["step"]) != latest
        latest = checkpoint.latest(run)
    # It goes on without Ray.
    last = result["step"] + 5
    assert run_trainer(one, should_stop=stop_after(last, start=result["step"]))["step"] == last
    run_trainer(whole, should_stop=stop_after(last))
    assert len(losses(root, "stopped")) == last
    assert losses(root, "stopped") == pytest.approx(losses(root, "whole"), abs=1e-4)


def test_worker_counts_are_checked_first(tmp_path: Path) -> None:
    from nanochat_ray.on_ray.train import fit

    root = Store.at(str(tmp_path))
    write_dataset(root, "base")
    with pytest.raises(ValueError, match="min_workers=3 is not allowed: from 0 to workers=2"):
        fit(job(root.uri, "run"), workers=2, min_workers=3)
    with pytest.raises(ValueError, match="workers=9 is not allowed: at most global_batch_size=8"):
        fit(job(root.uri, "run"), workers=9)


def test_permanent_error_of_one_rank_ends_it(tmp_path: Path) -> None:
    """Rank 0 alone writes for TensorBoard; /proc takes no folder from anybody."""
    from nanochat_ray.on_ray.train import fit

    root = Store.at(str(tmp_path))
    write_dataset(root, "base")
    logging_job = dataclasses.replace(job(root.uri, "run"), tensorboard="/proc/nowhere")
    with pytest.raises(FileNotFoundError, match="/proc/nowhere"):
        fit(logging_job, workers=2, cpus_per_worker=0.5)


def test_bad_runs_are_refused_at_the_start(tmp_path: Path) -> None:
    from nanochat_ray.on_ray.train import fit

    root = Store.at(str(tmp_path))
    with pytest.raises(ValueError, match="dataset='base' is not in"):
        fit(job(root.uri, "run"), workers=1)
    write_dataset(root, "base")
    wrong = dataclasses.replace(job(root.uri, "run"), model=tiny_config(vocab_size=300))
    with pytest.raises(ValueError, match="vocab_size=300 does not fit dataset 'base'"):
        fit(wrong, workers=1)
    with pytest.raises(ValueError, match="prepared for stage base, not for sft"):
        fit(job(root.uri, "run", stage="sft"), workers=1)
    with pytest.raises(ValueError, match="parent='nobody' has no checkpoint"):
        fit(dataclasses.replace(job(root.uri, "run"), parent="nobody"), workers=1)
    path = Path(root.root) / "datasets" / "base" / "train-1.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard train-1\.arrow of .* is damaged"):
        fit(job(root.uri, "run"), workers=1)
