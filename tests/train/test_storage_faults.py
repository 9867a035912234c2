"""Storage that fails within a run: training goes on, and ends with the bits of a sound one."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.storage import Store
from nanochat_ray.train import loggers
from tests.outage import Outage
from tests.tiny import write_dataset
from tests.train.run_trainer import run_trainer
from tests.train.test_control import checkpoints, job, records, same_weights
from tests.waiting import wait_for

FULL = OSError(errno.ENOSPC, "No space left on device", "/full/x")
READ_ONLY = OSError(errno.EROFS, "Read-only file system", "/ro/x")
AWAY = OSError("the bucket cannot be reached")


@pytest.fixture
def outage(monkeypatch: pytest.MonkeyPatch) -> Outage:
    """Of the runs alone: the dataset was copied."""
    one = Outage(monkeypatch)
    one.only = "/runs/run"
    return one


def faulty(outage: Outage, first: int, last: int) -> Callable[[dict[str, Any]], None]:
    """A hook: storage fails from step ``first`` to ``last``, at least once."""

    def on_record(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == last - 1:
            wait_for(lambda: outage.num_failures > 0, what="a failure")
        elif record["kind"] == "train" and record["step"] == last:
            outage.is_on = False
        elif record["kind"] == "train" and record["step"] == first:
            outage.is_on = True

    return on_record


def test_training_goes_on_without_storage(root: Store, outage: Outage) -> None:
    write_dataset(root, "base")
    errors = itertools.cycle([AWAY, FULL, READ_ONLY])
    outage.error = errors.__next__
    changes: dict[str, Any] = {"save_every": 1, "eval_every": 0, "sample_tokens": 0}
    reports: list[dict[str, Any]] = []
    fault = faulty(outage, 3, 9)

    def on_record(record: dict[str, Any]) -> None:
        reports.append(record)
        fault(record)

    result = run_trainer(job(root, "run", **changes), on_record=on_record)
    assert result["done"]
    steps = [r for r in reports if r["kind"] == "train"]
    assert [r["step"] for r in steps] == list(range(1, 13))
    late = [r for r in steps if r["save_delay"]]
    assert late
    assert "STORAGE FAILS: the last checkpoint is 0:0" in loggers.progress_line(late[-1])
    assert "STORAGE" not in loggers.progress_line(steps[0])
    slow = {**steps[0], "save_pending": 41.0}
    assert loggers.progress_line(slow).endswith("a checkpoint is being written for 0:41")
    run_trainer(job(root, "whole", **changes))
    assert same_weights(root, "run", "whole")
    assert len(records(root, "run")) == len(reports)  # the log has what was not written at first


def test_an_upload_that_breaks_is_repeated(root: Store, outage: Outage) -> None:
    write_dataset(root, "base")
    outage.after_bytes = 5_000
    changes: dict[str, Any] = {"save_every": 4, "eval_every": 0, "sample_tokens": 0}
    run_trainer(job(root, "run", **changes), on_record=faulty(outage, 3, 9))
    run_trainer(job(root, "whole", **changes))
    assert same_weights(root, "run", "whole")
    run = root.child("runs", "run")
    assert all(run.exists(f"{name}/manifest.json") for name in checkpoints(run))


@pytest.mark.slow
def test_a_run_whose_end_cannot_be_stored_fails(root: Store, outage: Outage) -> None:
    write_dataset(root, "base")
    outage.error = lambda: FULL
    changes: dict[str, Any] = {"save_every": 4, "eval_every": 0, "sample_tokens": 0}
    run = root.child("runs", "run")

    def on_record(record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == 5:
            wait_for(lambda: checkpoint.latest(run) == "step-000004", what="the first checkpoint")
            outage.is_on = True

    match = r"run /.*/run: checkpoint step-000012 could not be written for \d+ s: .*No space left"
    with pytest.raises(OSError, match=match):
        run_trainer(job(root, "run", save_timeout_s=0.0, **changes), on_record=on_record)
    outage.is_on = False
    assert checkpoint.latest(run) == "step-000004"
    # The same command goes on from there.
    assert run_trainer(job(root, "run", **changes))["done"]
    run_trainer(job(root, "whole", **changes))
    assert same_weights(root, "run", "whole")


def test_old_checkpoints_that_stay_end_nothing(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(root, "base")
    real = Store.delete

    def delete(store: Store, name: str) -> None:
        if name.startswith("step-"):
            raise OSError("away")
        real(store, name)

    monkeypatch.setattr(Store, "delete", delete)
    changes: dict[str, Any] = {"save_every": 3, "eval_every": 0, "keep_latest_k": 1}
    assert run_trainer(job(root, "run", **changes))["done"]
    assert checkpoint.latest(root.child("runs", "run")) == "step-000012"


def test_shards_are_read_when_storage_is_back(
    root: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_dataset(root, "base")
    monkeypatch.setenv("NANOCHAT_SHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Store, "local_path", lambda store, name: None)  # as of an object store
    outage = Outage(monkeypatch)
    outage.only = "/datasets/base"
    real = Store.read_bytes

    def read_bytes(store: Store, name: str) -> bytes:
        outage.is_on = name.endswith(".arrow") and outage.num_failures < 3
        return real(store, name)

    monkeypatch.setattr(Store, "read_bytes", read_bytes)
    assert run_trainer(job(root, "run", steps=2, eval_every=0, sample_tokens=0))["done"]
    assert outage.num_failures == 3
