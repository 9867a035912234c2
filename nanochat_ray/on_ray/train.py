"""Training by Ray Train: the same ``execute`` in every worker, fed by Ray Data.

The run's snapshots are its own (``checkpoint.snapshot``), so a run may be begun under Ray and
resumed without it. Ray restarts the group when a worker dies; the new group looks up where the
run stands and goes on from there.
"""

from __future__ import annotations

import os
from typing import Any

import ray
import ray.data
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from nanochat_ray.checkpoint import snapshot
from nanochat_ray.on_ray.feed import RankedRows, from_iterator
from nanochat_ray.storage import Store
from nanochat_ray.train.job import TrainJob, check, execute, open_dataset
from nanochat_ray.train.loop import same_run
from nanochat_ray.train.metrics import progress_line


def _worker(values: dict[str, Any]) -> None:
    torch.set_num_threads(int(values["threads"]))
    job = TrainJob.from_json(values["job"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    shard = ray.train.get_dataset_shard("train")

    def report(record: dict[str, Any]) -> None:
        wanted = record["kind"] == "eval" or record["step"] % values["print_every"] == 0
        if rank == 0 and (wanted or record["step"] == job.train.steps):
            print(progress_line(record), flush=True)

    result = execute(
        job,
        rank=rank,
        world=world,
        device=device,
        batches=from_iterator(shard, job.train, rank, world),
        report=report,
    )
    ray.train.report(result)


def fit(
    job: TrainJob,
    *,
    workers: int,
    gpus: bool = False,
    threads: int = 1,
    cpus_per_worker: float = 1.0,
    max_failures: int = 3,
    print_every: int = 10,
) -> dict[str, Any]:
    """Trains ``job`` on ``workers`` processes and returns what its last snapshot says of it.

    Raises ValueError for a job that cannot run, and what Ray Train raises if the workers fail
    more than ``max_failures`` times.
    """
    check(job)
    dataset, manifest, _ = open_dataset(job.storage, job.dataset)
    run = Store.at(job.storage).child("runs", job.run)

    def reached() -> int:
        name = snapshot.latest(run)
        return snapshot.step_of(name) if name else 0

    def result() -> dict[str, Any]:
        saved = snapshot.load_trainer(run)
        return {**saved["metrics"], "step": saved["step"], "done": reached() >= job.train.steps}

    if reached() >= job.train.steps:
        same_run(snapshot.load_trainer(run)["train_config"], job.train)
        return result()

    # The controller asks its workers this often whether they are alive, and a report waits for it.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # Ray Train would print every line of a worker a second time.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    own = Store.at(job.storage).child("runs", job.run, "ray")
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job.to_json(), "threads": threads, "print_every": print_every},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=120),
        scaling_config=ScalingConfig(
            num_workers=workers,
            use_gpu=gpus,
            resources_per_worker={"CPU": cpus_per_worker, **({"GPU": 1} if gpus else {})},
        ),
        datasets={"train": lambda: ray.data.from_items([{"start": reached()}])},
        dataset_config=RankedRows(dataset.uri, manifest, job.train),
        run_config=RunConfig(
            name="train",
            storage_path=own.root,
            storage_filesystem=None if own.is_local else own.fs,
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    trainer.fit()
    return result()
