"""Training on several nodes, of which one is lost: the bits of a run that nothing disturbed.

``NANOCHAT_CUTS=5 pytest -m cluster tests/on_ray/cluster/test_train.py -s`` cuts so many nodes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from nanochat_ray.bench.drill_train import sha256
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from tests.on_ray.cluster.nodes import Node, Nodes
from tests.processes import run_on_ranks
from tests.tiny import tiny_config, write_dataset
from tests.train.run_trainer import ENDLESS, run_trainer, stop_after
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

DRIVER = """
import json, sys
from nanochat_ray.on_ray import session
from nanochat_ray.on_ray.train import fit
from nanochat_ray.train.config import TrainerConfig

session.connect()
config, workers, min_workers = map(json.loads, sys.argv[1:])
# A node has 3 logical CPUs: one worker, and one CPU for the tasks of Ray Data.
fit(TrainerConfig.from_json(config), workers=workers, min_workers=min_workers, cpus_per_worker=2)
"""
WORKER = r"ray::.*RayTrainWorker"
NUM_CUTS = int(os.environ.get("NANOCHAT_CUTS", "1"))


def trainer_config(storage: str, run: str) -> TrainerConfig:
    train = TrainConfig(
        steps=ENDLESS,
        global_batch_size=8,
        micro_batch_size=4,
        eval_sequences=8,
        save_every=20,
        # At rates 30 times these, rounding that differs between 2 and 3 workers grows to 0.1.
        optim=OptimConfig(matrix_lr=6e-5, embedding_lr=1.5e-3, scalar_lr=1.5e-3, warmup_ratio=0.0),
    )
    return TrainerConfig(storage=storage, dataset="base", run=run, model=tiny_config(), train=train)


def _train_rank(rank: int, config: dict[str, Any], last_step: int) -> None:
    run_trainer(TrainerConfig.from_json(config), should_stop=stop_after(last_step))


def reference(folder: Path, run: Store) -> Store:
    """The same as ``run``, by two processes without Ray."""
    root = Store.at(str(folder))
    write_dataset(root, "base")
    last_step = checkpoint.step_of(checkpoint.latest(run) or "")
    run_on_ranks(_train_rank, trainer_config(root.uri, "whole").to_json(), last_step, world=2)
    return root.child("runs", "whole")


def losses(run: Store) -> list[float]:
    records = map(json.loads, run.read_text("metrics.jsonl").splitlines())
    return [record["loss"] for record in records if record["kind"] == "train"]


class Training:
    """A run of ``workers`` workers, with a driver on the head. After a loss it may go on with
    ``min_workers``."""

    def __init__(
        self, nodes: Nodes, config: TrainerConfig, log: Path, workers: int = 2, min_workers: int = 0
    ):
        self.nodes, self.run, self._log = (
            nodes,
            Store.at(config.storage).child("runs", config.run),
            log,
        )
        argv = [
            sys.executable,
            "-c",
            DRIVER,
            *map(json.dumps, [config.to_json(), workers, min_workers]),
        ]
        environment = {"RAY_ADDRESS": nodes.gcs_address}
        self.begin = time.monotonic()
        self._driver = nodes.start_process(nodes.head, argv, log, environment)

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._driver.pid, signal.SIGKILL)
        self._driver.wait()

    def workers(self) -> dict[int, Node]:
        """The node of each worker, by the process that it is."""
        return {
            process.pid: node for node in self.nodes.nodes for process in node.processes(WORKER)
        }

    def wait_for(self, condition: Callable[[], bool], what: str) -> float:
        """Seconds since ``begin``."""

        def holds() -> bool:
            assert self._driver.poll() in (None, 0), self._log.read_text()[-4000:]
            return condition()

        wait_for(holds, 240, what)
        return time.monotonic() - self.begin

    def stop(self) -> float:
        """Ends it as a job is stopped: with a checkpoint. Seconds that this takes."""
        start = time.monotonic() - self.begin
        (driver,) = psutil.Process(self._driver.pid).children()  # of nsenter
        driver.terminate()
        return self.wait_for(lambda: self._driver.poll() == 0, "the end of the run") - start

    def lose(self, disturb: Callable[[Node], None]) -> float:
        """Disturbs the node of a worker, not the head, after a checkpoint, and waits for the next
        one, then stops it. Returns the seconds until the group's workers ran again."""
        nodes = self.nodes
        self.wait_for(lambda: checkpoint.latest(self.run) is not None, "a first checkpoint")
        group = self.workers()
        victim = next(node for node in group.values() if node is not nodes.head)
        others = [node for node in nodes.nodes if node is not victim]
        before, start = checkpoint.latest(self.run), time.monotonic()
        disturb(victim)

        def new_workers() -> list[int]:
            workers = self.workers()
            return [pid for pid in workers.keys() - group.keys() if workers[pid] in others]

        try:
            self.wait_for(lambda: len(new_workers()) >= 2, "new workers")
            restart_s = time.monotonic() - start
            self.wait_for(lambda: checkpoint.latest(self.run) not in (before, None), "more steps")
            checkpoint_s = time.monotonic() - start
            self.stop()
        finally:
            nodes.restore(victim)
        print(
            f"\n{before}: {len(group)} workers on {len(set(group.values()))} nodes, new ones after"
            f" {restart_s:.1f} s, the next checkpoint after {checkpoint_s:.1f} s"
        )
        return restart_s


def test_two_nodes_train_the_bits_of_one(nodes: Nodes, storage: str, tmp_path: Path) -> None:
    root = Store.at(storage).child("undisturbed")
    write_dataset(root, "base")
    with Training(nodes, trainer_config(root.uri, "two"), tmp_path / "log") as training:
        start_s = training.wait_for(
            lambda: checkpoint.latest(training.run) is not None, "a checkpoint"
        )
        group = training.workers()
        end_s = training.stop()
    print(f"\na checkpoint after {start_s:.1f} s, the end {end_s:.1f} s after SIGTERM")
    assert len(group) == len(set(group.values())) == 2
    assert sha256(training.run) == sha256(reference(tmp_path / "reference", training.run))


@pytest.mark.parametrize("number", range(NUM_CUTS))
def test_cut_node_changes_no_bits(nodes: Nodes, storage: str, tmp_path: Path, number: int) -> None:
    root = Store.at(storage).child("cut")
    write_dataset(root, "base")
    config = trainer_config(root.uri, f"cut-{number}")
    with Training(nodes, config, tmp_path / "log") as training:
        training.lose(nodes.cut)
    assert sha256(training.run) == sha256(reference(tmp_path / "reference", training.run))


def test_killed_raylet_changes_no_bits(nodes: Nodes, storage: str, tmp_path: Path) -> None:
    root = Store.at(storage).child("raylet")
    write_dataset(root, "base")

    def kill_raylet(node: Node) -> None:
        (raylet,) = node.processes(r"\S*/raylet ")
        raylet.kill()

    config = trainer_config(root.uri, "raylet")
    with Training(nodes, config, tmp_path / "log") as training:
        training.lose(kill_raylet)
    assert sha256(training.run) == sha256(reference(tmp_path / "reference", training.run))


def test_training_goes_on_with_fewer_nodes(nodes: Nodes, storage: str, tmp_path: Path) -> None:
    root = Store.at(storage).child("fewer")
    write_dataset(root, "base")
    config = trainer_config(root.uri, "fewer")
    with Training(nodes, config, tmp_path / "log", workers=3, min_workers=2) as training:
        training.lose(nodes.cut)
    whole = reference(tmp_path / "reference", training.run)
    assert losses(training.run) == pytest.approx(losses(whole), abs=1e-4)
