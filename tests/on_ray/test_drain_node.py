"""The preStop hook waits for the replicas of a node, and not longer than it may."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nanochat_ray.on_ray import drain_node
from tests.tiny import wait_for


def test_replicas_are_counted_by_their_processes() -> None:
    before = drain_node.num_replicas()
    program = "import sys; print('ready', flush=True); sys.stdin.read()"
    # exec -a: the title that Ray gives the process of a replica.
    title = f"{drain_node.REPLICA}:nanochat:engine"
    command = ["bash", "-c", 'exec -a "$0" "$1" -c "$2"', title, sys.executable, program]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert drain_node.num_replicas() == before + 1
        process.communicate("")
    wait_for(lambda: drain_node.num_replicas() == before)


def test_it_waits_until_none_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_node, "POLL_S", 0.0)
    counts = [2, 1, 1, 0]
    assert drain_node.wait_for_replicas(60.0, lambda: counts.pop(0)) is True
    assert counts == []
    assert drain_node.wait_for_replicas(0.0, lambda: 1) is False


def test_bad_seconds_are_refused_before_ray_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drain_node, "drain", lambda *_: pytest.fail("Ray was asked"))
    with pytest.raises(ValueError, match="seconds=-1"):
        drain_node.main(["--seconds", "-1"])
