"""Ranks wait for one that reads or writes for longer than a step's collectives may take."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import Store
from nanochat_ray.train import checkpointer
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from tests.tiny import free_ports, tiny_config, write_dataset
from tests.train.run_trainer import run_trainer

TIMEOUT = 3.0
"""Seconds of a collective; what is slow takes twice as long."""
CONFIG = TrainConfig(
    steps=1,
    global_batch_size=4,
    micro_batch_size=2,
    eval_every=1,
    eval_sequences=4,
    sample_tokens=0,
    optim=OptimConfig(matrix_lr=0.005, embedding_lr=0.05, scalar_lr=0.05),
)


def slow_save(rank: int) -> None:
    """Each validation is the best so far, while the last best is still being uploaded."""
    real = checkpoint.save

    def save(*args: Any, **kwargs: Any) -> str:
        time.sleep(2 * TIMEOUT)
        return real(*args, **kwargs)

    checkpointer.checkpoint.save = save  # type: ignore[assignment]


def full_disk(rank: int) -> None:
    def save(*args: Any, **kwargs: Any) -> str:
        raise OSError("no space left")

    checkpointer.checkpoint.save = save  # type: ignore[assignment]


def run_rank(
    rank: int, port: int, values: dict[str, Any], fault: Callable[[int], None], out: Path
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=TIMEOUT)
    # Processes start at different times: none waits for that in a collective with a short limit.
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
    dist.init_process_group("gloo", rank=rank, world_size=2, store=store, timeout=limit)
    fault(rank)
    try:
        result = str(run_trainer(TrainerConfig.from_json(values))["done"])
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    out.with_suffix(f".{rank}").write_text(result)
    dist.destroy_process_group()


@pytest.mark.parametrize("fault", [slow_save, full_disk])
def test_ranks_wait_for_storage_and_fail_alike(
    root: Store, tmp_path: Path, fault: Callable[[int], None]
) -> None:
    write_dataset(root, "base", rows=16)
    job = TrainerConfig(
        storage=root.uri, dataset="base", run="run", model=tiny_config(), train=CONFIG
    )
    context, (port,) = multiprocessing.get_context("spawn"), free_ports(1)
    out = tmp_path / "result"
    ranks = [
        context.Process(target=run_rank, args=(rank, port, job.to_json(), fault, out))
        for rank in range(2)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(100)
    finally:
        for process in ranks:
            process.kill()
    message = "OSError: no space left" if fault is full_disk else "True"
    assert [out.with_suffix(f".{rank}").read_text() for rank in range(2)] == [message] * 2
