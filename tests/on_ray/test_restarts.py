"""A run whose driver or train controller is killed starts again by itself, and ends with the bits
of a run that nothing disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray

from nanochat_ray.bench.drill import matches
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.storage import Store
from tests.on_ray.test_train import weights
from tests.processes import REPO, run_job
from tests.tiny import write_dataset
from tests.waiting import wait_for

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def await_checkpoint(root: Store, run: str, after: str | None) -> None:
    """Returns when the run's latest checkpoint is another than ``after``."""
    store = root.child("runs", run)
    wait_for(lambda: checkpoint.latest(store) != after, 180, "another checkpoint")


def assert_equal_weights(root: Store, one: str, other: str) -> None:
    first, second = weights(root, one), weights(root, other)
    assert first
    assert all(first[name].equal(second[name]) for name in first)


def driver(supervisor: int) -> psutil.Process:
    """The command's own process, under its supervisor."""
    (process,) = psutil.Process(supervisor).children()
    return process


def actors(title: str) -> list[psutil.Process]:
    """Those of the tests' Ray, which the driver has joined."""
    processes = psutil.Process().children(recursive=True)
    return [process for process in processes if matches(process, f"ray::{title}")]


def stop_workers() -> None:
    """Stops the training, so that it cannot end before its driver or controller is killed."""
    workers = actors("RayTrainWorker")
    assert workers
    for worker in workers:
        worker.suspend()


@pytest.mark.timeout(600)
def test_killed_run_starts_again(tmp_path: Path) -> None:
    root = Store.at(str(tmp_path / "storage"))
    write_dataset(root, "base")
    flags = ["--storage", root.uri, "--depth", "1", "--tokens", "76800", "--batch-tokens", "128"]
    flags += ["--precision", "fp32", "--save-every", "4", "--sample-tokens", "4"]
    assert run_job("train", "--no-ray", "--run", "whole", *flags).returncode == 0
    command = [sys.executable, str(REPO / "jobs" / "train.py"), "--run", "killed", *flags]
    address = ray.get_runtime_context().gcs_address
    with (tmp_path / "log").open("wb") as log:
        supervisor = subprocess.Popen(
            [*command, "--workers", "1", "--restarts", "2"],
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_ADDRESS": address},
        )
    try:
        await_checkpoint(root, "killed", after=None)
        stop_workers()
        first, latest = actors("TrainController"), checkpoint.latest(root.child("runs", "killed"))
        driver(supervisor.pid).kill()
        await_checkpoint(root, "killed", after=latest)
        stop_workers()
        (second,) = set(actors("TrainController")) - set(first)
        second.kill()
        assert supervisor.wait(timeout=180) == 0
    finally:
        supervisor.kill()
        supervisor.wait()
    text = (tmp_path / "log").read_text()
    assert "ended with SIGKILL: restart 1 of 2" in text
    assert "ended with status 1: restart 2 of 2" in text
    assert_equal_weights(root, "whole", "killed")
