"""The preStop hook waits for replicas and for training to save, and not longer than it may."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from nanochat_ray.on_ray import drain_node
from tests.waiting import wait_for


@pytest.mark.parametrize(
    ("pattern", "title"),
    [
        (drain_node.REPLICA, "ray::ServeReplica:nanochat:engine"),
        (drain_node.TRAIN_WORKER, "ray::_RayTrainWorker__execute.get_next"),
        (drain_node.TRAIN_WORKER, "ray::RayTrainWorker"),
    ],
)
def test_processes_are_counted_by_title(
    pattern: re.Pattern[str], title: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Other tests start such processes too.
    monkeypatch.setattr(drain_node.psutil, "process_iter", psutil.Process().children)
    before = drain_node.num_processes(pattern)
    program = "import sys; print('ready', flush=True); sys.stdin.read()"
    # exec -a: the title that Ray gives the process.
    command = ["bash", "-c", 'exec -a "$0" "$1" -c "$2"', title, sys.executable, program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert drain_node.num_processes(pattern) == before + 1
        process.communicate("")
    wait_for(lambda: drain_node.num_processes(pattern) == before)


def test_it_waits_until_none_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_node, "POLL_S", 0.0)
    counts = [2, 1, 1, 0]
    assert drain_node.wait_until_none(60.0, lambda: counts.pop(0)) is True
    assert counts == []
    assert drain_node.wait_until_none(0.0, lambda: 1) is False


@pytest.mark.parametrize(("workers", "least_s"), [(0, 0.0), (1, 60.0)])
def test_only_training_workers_get_time_to_save(
    workers: int, least_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds: list[float] = [100.0]
    clock = SimpleNamespace(
        monotonic=lambda: seconds[-1], sleep=lambda s: seconds.append(seconds[-1] + s)
    )
    monkeypatch.setattr(drain_node, "time", clock)
    monkeypatch.setattr(drain_node, "drain", lambda *_: None)
    monkeypatch.setattr(
        drain_node, "num_processes", lambda p: workers if p is drain_node.TRAIN_WORKER else 0
    )
    drain_node.main(["--seconds", "90", "--save-seconds", "60"])
    assert seconds[-1] - 100.0 == least_s


def test_bad_seconds_are_refused_before_ray_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_node, "drain", lambda *_: pytest.fail("Ray was asked"))
    with pytest.raises(ValueError, match="seconds=-1"):
        drain_node.main(["--seconds", "-1"])
