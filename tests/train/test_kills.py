"""SIGKILL at any moment, also inside a checkpoint and inside an upload, changes no bit of the end.

By default a few kills; ``NANOCHAT_KILLS=20 pytest tests/train/test_kills.py -s`` does as many as
are asked for, in turn at a random moment, while a checkpoint is written, and during an upload.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from tests.processes import FORKSERVER, run_job
from tests.tiny import tiny_config, write_dataset
from tests.train.run_trainer import run_trainer
from tests.waiting import wait_for

KILLS = int(os.environ.get("NANOCHAT_KILLS", "3"))
CONFIG = TrainConfig(
    steps=32,
    global_batch_size=8,
    micro_batch_size=4,
    eval_every=13,
    eval_sequences=8,
    save_every=4,
    sample_tokens=0,
    optim=OptimConfig(matrix_lr=0.005, embedding_lr=0.05, scalar_lr=0.05, weight_decay=0.1),
)
REPO = Path(__file__).parents[2]


def train(values: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    run_trainer(TrainerConfig.from_json(values))


def spawn(job: TrainerConfig) -> ForkServerProcess:
    """Starts a process that trains."""
    process = FORKSERVER.Process(target=train, args=(job.to_json(),))
    process.start()
    return process


def job(root: Store, run: str) -> TrainerConfig:
    return TrainerConfig(
        storage=root.uri, dataset="base", run=run, model=tiny_config(), train=CONFIG
    )


def inside_a_checkpoint(run: Store) -> bool:
    """A checkpoint's folder with files, but not yet the manifest that makes it one."""
    for name in run.list():
        if (
            name.startswith("step-")
            and (contents := run.list(name))
            and "manifest.json" not in contents
        ):
            return True
    return False


def state(root: Store, run: str) -> dict[str, torch.Tensor]:
    final = checkpoint.load(root.child("runs", run), optimizer=True)
    assert final.step == CONFIG.steps
    assert final.optimizer is not None
    return {**final.weights, **final.optimizer}


def kill(process: ForkServerProcess, moment: Callable[[], bool], run: Store) -> tuple[str, str]:
    """SIGKILL at ``moment``; where the run then stood: its latest checkpoint and what was begun."""
    wait_for(lambda: not process.is_alive() or moment(), 60, "the moment to kill", every=0.0005)
    process.kill()
    process.join(20)
    torn = [n for n in run.list() if n.startswith("step-") and not run.exists(f"{n}/manifest.json")]
    return checkpoint.latest(run) or "nothing", ", ".join(torn) or "none"


@pytest.mark.slow
def test_killed_at_any_moment_ends_equal(root: Store, s3: str) -> None:
    remote = Store.at(s3).child(f"kills-{time.time_ns()}")
    for store in (root, remote):
        write_dataset(store, "base")
    for name in ("whole", "again"):  # the first also starts the server of processes
        began = time.monotonic()
        spawn(job(root, name)).join(60)
        seconds = time.monotonic() - began
    reference = state(root, "whole")
    rng, kills = random.Random(time.time_ns()), 0
    hit = {"random": 0, "checkpoint": 0, "upload": 0}
    while kills < KILLS:
        kind = tuple(hit)[kills % 3]
        store = remote if kind == "upload" else root
        # A run that ends before its moment comes is tried again under another name.
        name = f"killed-{kills}-{time.time_ns()}"
        run = store.child("runs", name)
        process = spawn(job(store, name))
        at = time.monotonic() + rng.uniform(0.1, 0.9) * seconds
        nth = rng.randrange(6)

        def moment(kind=kind, run=run, at=at, nth=nth) -> bool:
            if kind == "random":
                return time.monotonic() > at
            last_checkpoint = checkpoint.latest(run)
            steps = checkpoint.step_of(last_checkpoint) if last_checkpoint else 0
            return steps >= nth * CONFIG.save_every and inside_a_checkpoint(run)

        latest, torn = kill(process, moment, run)
        if process.exitcode != -signal.SIGKILL or (kind != "random" and torn == "none"):
            continue
        again = spawn(job(store, name))
        again.join(60)
        assert again.exitcode == 0
        contents = state(store, name)
        assert contents.keys() == reference.keys()
        assert all(torch.equal(contents[key], reference[key]) for key in reference), (kind, latest)
        print(f"kill {kills + 1}: {kind}, latest {latest}, half written: {torn} → same bits")
        hit[kind] += 1
        kills += 1
    print(f"{kills} of {kills} runs ended with the bits of the uninterrupted one: {hit}")


@pytest.mark.slow
def test_two_killed_workers_resume_as_one(root: Store, tmp_path: Path) -> None:
    write_dataset(root, "base")
    flags = ["--storage", root.uri, "--depth", "1", "--tokens", "5120", "--batch-tokens", "256"]
    flags += ["--precision", "fp32", "--lr-scale", "0.1", "--micro-batch-size", "4"]
    flags += ["--save-every", "3", "--sample-tokens", "4"]
    script = str(REPO / "jobs" / "train.py")
    # torchrun leaves a folder for logs in TMPDIR.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "dumb", "TMPDIR": str(tmp_path)}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with subprocess.Popen(
        [*two, "--", script, "--run", "killed", *flags],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        run = root.child("runs", "killed")
        wait_for(lambda: checkpoint.latest(run) is not None, 180, "a first checkpoint")
        # torchrun's workers have sessions of their own: a signal to its group spares them.
        agent = psutil.Process(process.pid)
        for victim in (agent, *agent.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
    last_step = checkpoint.step_of(checkpoint.latest(run) or "")
    losses = {}
    for name in ("killed", "whole"):
        result = run_job("train", "--no-ray", "--run", name, *flags)
        assert result.returncode == 0, result.stderr
        text = root.child("runs", name).read_text("metrics.jsonl")
        records = map(json.loads, text.splitlines())
        losses[name] = [r["loss"] for r in records if r["kind"] == "train"]
    assert 0 < last_step <= len(losses["whole"]) == 20
    assert losses["killed"] == pytest.approx(losses["whole"], abs=1e-5)


@pytest.mark.parametrize("rows", [8, 13])
def test_batches_do_not_depend_on_workers(rows: int) -> None:
    import numpy as np

    from nanochat_ray.train.rank_sequences import rank_sequences

    config = dataclasses.replace(CONFIG, global_batch_size=rows, micro_batch_size=1)
    for step in (0, 3, 17):
        alone = rank_sequences(config, 50, step, 0, 1)
        for world in range(2, rows + 1):
            parts = [rank_sequences(config, 50, step, rank, world) for rank in range(world)]
            assert np.array_equal(np.concatenate(parts), alone)
            assert min(map(len, parts)) >= 1
