"""How a run is steered from outside: stop, resume, what is kept, what is cut, what is shown."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanochat_ray import retry
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import Store
from nanochat_ray.train import checkpointer, loggers, preflight, trainer
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from nanochat_ray.train.data_loader import prefetch
from nanochat_ray.train.step import Batch
from nanochat_ray.train.stop import STOPPED
from tests.processes import run_job
from tests.tiny import tiny_config, write_dataset
from tests.train.run_trainer import run_trainer
from tests.waiting import wait_for

REPO = Path(__file__).parents[2]
CONFIG = TrainConfig(
    steps=12,
    global_batch_size=8,
    micro_batch_size=4,
    eval_every=4,
    eval_sequences=8,
    save_every=3,
    sample_tokens=4,
    optim=OptimConfig(matrix_lr=0.005, embedding_lr=0.05, scalar_lr=0.05),
)


def job(root: Store, run: str, **changes: Any) -> TrainerConfig:
    train = dataclasses.replace(CONFIG, **changes)
    return TrainerConfig(
        storage=root.uri, dataset="base", run=run, model=tiny_config(), train=train
    )


def records(root: Store, run: str) -> list[dict[str, Any]]:
    text = root.child("runs", run).read_text("metrics.jsonl")
    return [json.loads(line) for line in text.splitlines()]


def checkpoints(run: Store) -> list[str]:
    return [name for name in run.list() if name.startswith("step-")]


def same_weights(root: Store, one: str, two: str) -> bool:
    a, b = (checkpoint.load(root.child("runs", r), optimizer=True) for r in (one, two))
    assert a.optimizer is not None
    assert b.optimizer is not None
    one_has, two_has = {**a.weights, **a.optimizer}, {**b.weights, **b.optimizer}
    assert one_has.keys() == two_has.keys()
    return all(torch.equal(tensor, two_has[name]) for name, tensor in one_has.items())


# --- the process -----------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_saves_exits_75_and_resumes(root: Store) -> None:
    write_dataset(root, "base")
    flags = ["--no-ray", "--storage", root.uri, "--depth", "1", "--batch-tokens", "128"]
    flags += ["--precision", "fp32", "--sample-tokens", "0", "--print-every", "1"]
    flags += ["--tokens", str(128 * 150)]
    command = [sys.executable, str(REPO / "jobs" / "train.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    # The run is at most two pipes of lines, some 80 steps, ahead of what is read here.
    with subprocess.Popen(
        [*command, "--run", "stopped"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        pipesize=4096,
    ) as process:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
        assert process.wait(120) == STOPPED == 75
    last = json.loads(lines[-1])
    assert not last["done"]
    assert (
        checkpoint.step_of(checkpoint.latest(root.child("runs", "stopped")) or "") == last["step"]
    )
    for run in ("stopped", "whole"):
        assert run_job("train", *flags, "--run", run).returncode == 0
    assert same_weights(root, "stopped", "whole")


def test_resume_auto_never_must(root: Store) -> None:
    for resume in ("auto", "never"):
        preflight.check_resume(root.uri, "run", resume)
    with pytest.raises(ValueError, match=r"resume='must', but run 'run' has no checkpoint in"):
        preflight.check_resume(root.uri, "run", "must")
    write_dataset(root, "base")
    run_trainer(job(root, "run", steps=2))
    for resume in ("auto", "must"):
        preflight.check_resume(root.uri, "run", resume)
    with pytest.raises(ValueError, match=r"resume='never', but run 'run' exists .*step-000002"):
        preflight.check_resume(root.uri, "run", "never")


def test_too_little_memory_is_refused(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(root, "base")
    monkeypatch.setattr(
        preflight.machine, "free_memory", lambda device, local_world_size: 100 << 20
    )
    with pytest.raises(
        ValueError, match=r"micro_batch_size=4 needs about 0\.\d GiB on each of 1 worker"
    ):
        run_trainer(job(root, "run"))
    assert not root.child("runs", "run").exists("latest")


# --- checkpoints -------------------------------------------------------------------------------


@pytest.mark.slow
def test_newest_and_best_checkpoints_stay(root: Store, s3: str) -> None:
    for store in (root, Store.at(s3).child(f"kept-{time.time_ns()}")):
        write_dataset(store, "base")
        # Rates so high that the validation is best early and gets worse.
        optim = dataclasses.replace(
            CONFIG.optim, embedding_lr=3.0, matrix_lr=0.3, warmdown_ratio=0.0
        )
        run_trainer(
            job(store, "run", steps=20, optim=optim, save_every=2, eval_every=2, keep_latest_k=2)
        )
        run = store.child("runs", "run")
        evals = [r for r in records(store, "run") if r["kind"] == "eval"]
        figures = {r["step"]: r["bits_per_byte"] for r in evals}
        best = min(figures, key=figures.__getitem__)
        assert 0 < best < 18, figures
        assert checkpoint.best(run) == checkpoint.name_of(best)
        assert checkpoint.latest(run) == "step-000020"
        saves = [r["step"] for r in records(store, "run") if r["kind"] == "save"]
        assert len(saves) > 2
        assert checkpoints(run) == [checkpoint.name_of(n) for n in sorted({best, *saves[-2:]})]
        checkpoint.load(run, checkpoint.best(run), optimizer=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_refusals", [0, 7])
def test_slow_storage_does_not_stall(
    root: Store, monkeypatch: pytest.MonkeyPatch, num_refusals: int
) -> None:
    """Also not if the uploads fail in the end, and begin again at any moment of a step."""
    write_dataset(root, "base")
    monkeypatch.setattr(retry, "FIRST_DELAY_S", 0.03)
    monkeypatch.setattr(retry, "LAST_DELAY_S", 0.03)
    real, last_step, refusals = checkpoint.save, 0, iter(range(num_refusals))

    def report(record: dict[str, Any]) -> None:
        nonlocal last_step
        last_step = max(last_step, record["step"])

    def slow(*args: Any, **kwargs: Any) -> str:
        # Not done before training has gone on: if it waited for this, it would never.
        goal = min(60, last_step + 5)
        wait_for(lambda: last_step >= goal, 30, "training beside its checkpoint", every=0.001)
        if next(refusals, None) is not None:
            raise OSError("the bucket cannot be reached")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpointer.checkpoint, "save", slow)
    slowly = job(root, "slow", steps=60, save_every=1, eval_every=0, keep_best=False)
    run_trainer(slowly, on_record=report)
    saves = [r for r in records(root, "slow") if r["kind"] == "save"]
    assert 2 <= len(saves) < 60
    monkeypatch.undo()
    run_trainer(job(root, "quick", steps=60, save_every=1, eval_every=0, keep_best=False))
    assert same_weights(root, "slow", "quick")


def test_preemption_notice_saves_and_continues(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(root, "base")
    monkeypatch.setattr(trainer, "POLL_INTERVAL_S", 0.0)
    answers = iter([False] * 4 + [True] + [False] * 20)
    result = run_trainer(
        job(root, "run", save_every=0, keep_best=False), should_save=answers.__next__
    )
    assert result["done"]
    assert checkpoints(root.child("runs", "run")) == ["step-000005", "step-000012"]


@pytest.mark.slow
def test_infinite_weights_are_not_written(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(root, "base")
    run_trainer(job(root, "run"), should_stop=iter([False, False, True]).__next__)
    from nanochat_ray.optim import flat

    real = flat.FlatGroup.update

    def with_nan(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        self.weights[-1] = float("inf")

    monkeypatch.setattr(flat.FlatGroup, "update", with_nan)
    with pytest.raises(FloatingPointError, match=r"not finite|diverged"):
        run_trainer(job(root, "run", save_every=1))
    assert checkpoint.latest(root.child("runs", "run")) == "step-000003"


@pytest.mark.slow
def test_spike_clip_is_equal_after_a_resume(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(root, "base")
    real, clips = trainer.train_step, []

    def record_clip(*args: Any, clip: float, **kwargs: Any) -> Any:
        clips.append(clip)
        return real(*args, clip=clip, **kwargs)

    monkeypatch.setattr(trainer, "train_step", record_clip)
    changes = {"steps": 56, "spike_clip": 1.05, "eval_every": 0, "save_every": 50}
    changes |= {"sample_tokens": 0, "micro_batch_size": 8}
    run_trainer(job(root, "whole", **changes))
    assert clips[:50] == [0.0] * 50
    assert all(clip > 0 for clip in clips[50:])
    norms = [r["grad_norm"] for r in records(root, "whole") if r["kind"] == "train"]
    assert clips[55] == pytest.approx(1.05 * np.median(norms[:55]))
    stop = iter([False] * 52 + [True])
    run_trainer(job(root, "halves", **changes), should_stop=stop.__next__)
    run_trainer(job(root, "halves", **changes))
    assert same_weights(root, "whole", "halves")


# --- the feed ------------------------------------------------------------------------------------


def numbered_batches(count: int, steps: list[int]) -> Iterator[Batch]:
    for n in range(count):
        steps.append(n)
        yield Batch(np.full((1, 3), n, dtype=np.uint16))


@pytest.mark.slow
def test_prefetch_keeps_order_and_depth() -> None:
    steps: list[int] = []
    requests: list[int] = []

    def batches() -> Iterator[Batch]:
        for batch in numbered_batches(50, steps):
            # Two wait in the queue, and this one for room in it.
            assert steps[-1] <= len(requests) + 2
            yield batch

    ready = prefetch(batches(), pin=False, depth=2)
    for n in range(50):
        requests.append(n)
        assert int(next(ready).ids[0, 0]) == n
        wait_for(lambda: len(steps) >= min(50, len(requests) + 3), what="reading ahead")
    assert list(ready) == []


def test_a_closed_prefetch_ends_its_thread() -> None:
    threads = threading.active_count()
    ready = prefetch(numbered_batches(50, []), pin=False)
    next(ready)
    ready.close()
    wait_for(lambda: threading.active_count() <= threads, what="the thread's end")


def test_prefetch_raises_the_loaders_error() -> None:
    def broken() -> Iterator[Batch]:
        yield Batch(np.zeros((1, 3), dtype=np.uint16))
        raise ValueError("shard 7 is damaged")

    ready = prefetch(broken(), pin=False)
    next(ready)
    with pytest.raises(ValueError, match="shard 7"):
        next(ready)


# --- what people see ----------------------------------------------------------------------


def test_report_and_progress_lines(root: Store, tmp_path: Path) -> None:
    write_dataset(root, "base")
    records: list[dict[str, Any]] = []
    with_board = dataclasses.replace(job(root, "run"), tensorboard=str(tmp_path / "board"))
    result = run_trainer(with_board, on_record=records.append)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(1, 13))
    line = loggers.progress_line([r for r in records if r["kind"] == "train"][1])
    assert re.fullmatch(
        r"step 2/12  loss \d\.\d+  bpb \d\.\d+  norm [\d.]+  lr ×[\d.]+  [\d,]+ tokens/s  "
        r"MFU [\d.]+%  data wait [\d.]+%  left \d+:\d\d",
        line,
    )
    kinds = {r["kind"]: loggers.progress_line(r) for r in records}
    assert kinds.keys() == {"train", "eval", "sample", "save"}
    assert "validation: bits_per_byte" in kinds["eval"]
    assert re.search(r"training stood still for \d+\.\d", kinds["save"])
    assert {"mfu", "data_wait_share", "longest_save_stall_s", "bits_per_byte"} <= result.keys()
    page = root.child("runs", "run").read_text("report.html")
    for text in (
        *("validation, bits per byte", "training loss", "learning rate", "gradient norm"),
        *("tokens per second", "MFU", "Greedy texts after step 12"),
        *("Hardware", "TFLOP/s in fp32", "Configuration", "matrix_lr"),
    ):
        assert text in page, text
    assert "http" not in page.replace("http-equiv", "")
    assert "<script" not in page
    files = list((tmp_path / "board" / "run").glob("events.out.tfevents.*"))
    assert len(files) == 1
    assert files[0].stat().st_size > 1000


def test_report_takes_a_nan_loss(root: Store) -> None:
    record = {"step": 1, "kind": "train", "loss": float("nan"), "grad_norm": 1.0}
    from nanochat_ray.train.report import render

    assert "gradient norm" in render("run", [record], {}, about={}, hardware={})
    assert loggers.finite_metrics(record) == {"train/grad_norm": 1.0}


def test_missing_wandb_is_named() -> None:
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(
            ValueError, match=r"wandb='p' needs .* pip install nanochat_ray\[wandb\]"
        ):
            loggers.check_installed(wandb="p")
    loggers.check_installed(wandb="")
