"""The drill for training, over a program that stands in for ``nanochat-ray train``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from nanochat_ray.bench import drill_train
from nanochat_ray.bench.drill_train import Args, Round
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.storage import Store
from tests.waiting import wait_for

STEPS = 20
PROGRAM = f"""
import os, signal, sys
run, flags = os.path.join(sys.argv[3], "runs", sys.argv[5]), sys.argv[6:]
os.makedirs(run, exist_ok=True)
with open(run + ".starts", "a+") as starts:
    starts.write("x")
    starts.seek(0)
    num_kills = len(starts.read()) - 1

def save():
    name = f"step-{{len(os.listdir(run)) + 1:06d}}"
    os.makedirs(os.path.join(run, name))
    open(os.path.join(run, name, "manifest.json"), "w").close()

save()
if flags == ["fail"]:
    sys.exit("no more steps")
is_drill = not run.endswith("-undisturbed")
if is_drill and flags[:1] == ["kills"] and num_kills < int(flags[1]):
    signal.pause()
while len(os.listdir(run)) < {STEPS}:
    save()
if is_drill and flags[:1] == ["until"]:
    open(flags[1]).read()
    save()
"""
"""Ends after so many steps. Flags: "kills N" lets the first N starts save one checkpoint and wait
for a signal; "until PIPE" waits at the end until something is written to a named pipe."""


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill_train, "PROGRAM", (sys.executable, "-c", PROGRAM))
    monkeypatch.setattr(drill_train, "POLL_S", 0.002)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def arguments(folder: Path, **changes: Any) -> Args:
    fields = {"train": "", "storage": str(folder), "delay_s": 0.01, "recover_s": 30.0}
    return Args(**{**fields, **changes})


def latest(folder: Path, run: str) -> str:
    return checkpoint.latest(Store.at(str(folder)).child("runs", run)) or ""


def test_a_killed_driver_is_started_again(tmp_path: Path) -> None:
    args = arguments(tmp_path, parts=("driver",), rounds=2, train="kills 2")
    rounds = drill_train.drill_run(args, tmp_path)
    assert [(r.part, r.restarts) for r in rounds] == [("driver", 1), ("driver", 1)]
    assert all(r.recovery_s for r in rounds)
    assert [r.checkpoint for r in rounds] == [checkpoint.name_of(1), checkpoint.name_of(2)]
    assert latest(tmp_path, "drill") == checkpoint.name_of(STEPS)


@pytest.mark.parametrize("order", ["before the kill", "after it, by a worker that goes on"])
def test_only_a_successor_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    kill_one = drill_train._kill_one

    def publish() -> None:
        folder = tmp_path / "runs" / "drill" / checkpoint.name_of(2)
        folder.mkdir()
        (folder / "manifest.json").touch()

    def publish_and_kill(command: drill_train.Command, *args: Any) -> Any:
        if order == "before the kill":
            publish()
        processes = kill_one(command, *args)
        if order != "before the kill":
            publish()
        return processes

    monkeypatch.setattr(drill_train, "_kill_one", publish_and_kill)
    args = arguments(tmp_path, parts=("driver",), train="kills 1")
    (counts,) = drill_train.drill_run(args, tmp_path)
    assert counts.checkpoint == checkpoint.name_of(2)
    assert counts.recovery_s


def test_silent_storage_keeps_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def latest_of_silent_storage(_: Store) -> str:
        raise OSError

    args = arguments(tmp_path, train="kills 1")
    with drill_train._command(args, "drill", tmp_path) as command:
        wait_for(lambda: command.latest == checkpoint.name_of(1))
        monkeypatch.setattr(drill_train, "_latest", latest_of_silent_storage)
        assert command.latest == checkpoint.name_of(1)


@pytest.mark.parametrize(
    ("flags", "has_supervisor"),
    [
        *(("--restarts 50", True), ("--depth 2 --restarts=50", True), ("--restarts 05", True)),
        *(("--restarts 0", False), ("--restarts=00 --depth 2", False), ("--depth 2", False)),
    ],
)
def test_restarts_make_a_supervisor(flags: str, has_supervisor: bool) -> None:
    assert drill_train.has_supervisor(flags) == has_supervisor


def test_an_outage_is_two_commands(tmp_path: Path) -> None:
    commands = {name: f"date +%s.%N > {tmp_path}/{name}" for name in ("break", "mend")}
    os.mkfifo(tmp_path / "pipe")
    args = arguments(
        tmp_path,
        train=f"until {tmp_path}/pipe",
        parts=("outage",),
        break_command=commands["break"],
        mend_command=f"{commands['mend']}; echo > {tmp_path}/pipe",
        outage_s=0.1,
    )
    (counts,) = drill_train.drill_run(args, tmp_path)
    assert counts.restarts == 0
    times = [float((tmp_path / name).read_text()) for name in commands]
    assert times[1] - times[0] >= 0.1
    with pytest.raises(ValueError, match="outage needs break_command and mend_command"):
        arguments(tmp_path, parts=("outage",))


def test_a_run_that_is_too_short_is_refused(tmp_path: Path) -> None:
    outage = {"break_command": "true", "mend_command": "true", "outage_s": 0.001}
    args = arguments(tmp_path, parts=("outage",), rounds=STEPS + 1, **outage)
    with pytest.raises(ValueError, match="rounds=21 is not allowed: the run was complete"):
        drill_train.drill_run(args, tmp_path)


def test_a_run_that_fails_by_itself_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the command ended with status 1: no more steps"):
        drill_train.train_undisturbed(arguments(tmp_path, train="fail"), "run", tmp_path)


@pytest.mark.parametrize("digests", [["a", "a"], ["a", "b"]])
def test_status_says_whether_bits_are_equal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    digests: list[str],
) -> None:
    is_equal, answers = digests[0] == digests[1], iter(digests)
    monkeypatch.setattr(drill_train, "sha256", lambda run: next(answers))
    status = drill_train.main(arguments(tmp_path, parts=("driver",), train="kills 1"))
    assert status == (not is_equal)
    assert latest(tmp_path, "drill-undisturbed") == checkpoint.name_of(STEPS)
    fields = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (fields["bitwise_equal"], fields["sha256"]) == (is_equal, digests)
    with pytest.raises(ValueError, match="run='drill' is not allowed: it exists"):
        drill_train.main(arguments(tmp_path))


def test_table_by_hand() -> None:
    rounds = [Round("worker", "a", t) for t in (3.0, 1.0, 8.0)] + [Round("gcs", "b", None, 2)]
    assert drill_train.table(rounds).splitlines()[2:] == [
        "| worker | 3 | 0 | 3.0 | 8.0 |",
        "| gcs | 1 | 2 | never | never |",
    ]
