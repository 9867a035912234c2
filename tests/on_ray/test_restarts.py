"""A run whose driver is killed starts again by itself, and ends with the bits of a run that nothing
disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.storage import Store
from tests.on_ray.test_train import weights
from tests.processes import REPO, run_job
from tests.tiny import wait_for, write_dataset

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def wait_for_checkpoint(root: Store, run: str) -> None:
    wait_for(lambda: checkpoint.latest(root.child("runs", run)) is not None, 90, "a checkpoint")


def assert_equal_weights(root: Store, one: str, other: str) -> None:
    first, second = weights(root, one), weights(root, other)
    assert first
    assert all(first[name].equal(second[name]) for name in first)


def test_killed_driver_starts_again(tmp_path: Path) -> None:
    root = Store.at(str(tmp_path / "storage"))
    write_dataset(root, "base")
    flags = ["--storage", root.uri, "--depth", "1", "--tokens", "51200", "--batch-tokens", "128"]
    flags += ["--precision", "fp32", "--save-every", "4"]
    assert run_job("train", "--no-ray", "--run", "whole", *flags).returncode == 0
    command = [sys.executable, str(REPO / "jobs" / "train.py"), "--run", "killed", *flags]
    address = ray.get_runtime_context().gcs_address
    with (tmp_path / "log").open("wb") as log:
        supervisor = subprocess.Popen(
            [*command, "--workers", "1", "--restarts", "1"],
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_ADDRESS": address},
        )
    try:
        wait_for_checkpoint(root, "killed")
        (driver,) = psutil.Process(supervisor.pid).children()
        driver.kill()
        assert supervisor.wait(timeout=180) == 0
    finally:
        supervisor.kill()
        supervisor.wait()
    assert "ended with SIGKILL: restart 1 of 1" in (tmp_path / "log").read_text()
    assert_equal_weights(root, "whole", "killed")
