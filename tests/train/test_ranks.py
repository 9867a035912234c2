"""Ranks wait for one that reads or writes for longer than a step's collectives may take."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import Store
from nanochat_ray.train import checkpointer
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from tests.processes import run_on_ranks
from tests.tiny import tiny_config, write_dataset
from tests.train.run_trainer import run_trainer

TIMEOUT = 4.0
"""Seconds of a collective, where one waits until another has failed."""
CONFIG = TrainConfig(
    steps=1,
    global_batch_size=4,
    micro_batch_size=2,
    eval_every=1,
    eval_sequences=4,
    sample_tokens=0,
    save_timeout_s=0.0,
    optim=OptimConfig(matrix_lr=0.005, embedding_lr=0.05, scalar_lr=0.05),
)


def slow_save(rank: int) -> None:
    """Each takes until a collective, which the other rank does not join, has failed."""
    real = checkpoint.save
    seconds = datetime.timedelta(seconds=TIMEOUT)
    groups = [dist.new_group(timeout=seconds) for _ in range(4)]

    def save(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            dist.barrier(groups.pop())
        return real(*args, **kwargs)

    checkpointer.checkpoint.save = save  # type: ignore[assignment]


def full_disk(rank: int) -> None:
    def save(*args: Any, **kwargs: Any) -> str:
        raise OSError("no space left")

    checkpointer.checkpoint.save = save  # type: ignore[assignment]


def train(rank: int, values: dict[str, Any], fault: Callable[[int], None], out: Path) -> None:
    fault(rank)
    try:
        result = str(run_trainer(TrainerConfig.from_json(values))["done"])
    except Exception as error:
        result = f"{type(error).__name__}: {error}"
    out.with_suffix(f".{rank}").write_text(result)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [slow_save, full_disk])
def test_ranks_wait_for_storage_and_fail_alike(
    root: Store, tmp_path: Path, fault: Callable[[int], None]
) -> None:
    write_dataset(root, "base", rows=16)
    job = TrainerConfig(
        storage=root.uri, dataset="base", run="run", model=tiny_config(), train=CONFIG
    )
    out = tmp_path / "result"
    seconds = TIMEOUT if fault is slow_save else 60.0
    run_on_ranks(train, job.to_json(), fault, out, timeout_s=seconds)
    results = [out.with_suffix(f".{rank}").read_text() for rank in range(2)]
    if fault is slow_save:
        assert results == ["True"] * 2
    else:
        assert results[0] == results[1]
        assert re.fullmatch(
            r"OSError: .* could not be written for \d+ s: no space left", results[0]
        )
