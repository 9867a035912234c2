"""Whom else a run tells of its steps: TensorBoard and Weights & Biases, by choice, rank 0 alone."""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from nanochat_ray import config as configs

if TYPE_CHECKING:
    from nanochat_ray.train.job import TrainJob

Observer = Callable[[dict[str, Any]], None]
_LEFT_OUT = ("kind", "step", "steps", "time")


def check(*, wandb: str) -> None:
    """ValueError if what was asked for is not installed."""
    if wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"wandb={wandb!r} needs the package wandb: pip install nanochat_ray[wandb]"
        )


def figures(record: dict[str, Any]) -> dict[str, float]:
    """A record's finite numbers under ``<kind>/<name>``."""
    return {
        f"{record['kind']}/{name}": float(value)
        for name, value in record.items()
        if name not in _LEFT_OUT and isinstance(value, int | float) and math.isfinite(value)
    }


@contextlib.contextmanager
def watching(job: TrainJob, rank: int) -> Iterator[Observer]:
    """A function that passes each record to all observers that ``job`` names."""
    with contextlib.ExitStack() as stack:
        told: list[Observer] = []
        if job.tensorboard and rank == 0:
            told.append(stack.enter_context(_tensorboard(job)))
        if job.wandb and rank == 0:
            told.append(stack.enter_context(_wandb(job)))

        def observe(record: dict[str, Any]) -> None:
            for tell in told:
                tell(record)

        yield observe


@contextlib.contextmanager
def _tensorboard(job: TrainJob) -> Iterator[Observer]:
    # tensorboardX writes the same files as torch.utils.tensorboard and comes with ray[train].
    from tensorboardX import SummaryWriter

    with SummaryWriter(f"{job.tensorboard}/{job.run}") as writer:

        def tell(record: dict[str, Any]) -> None:
            for name, value in figures(record).items():
                writer.add_scalar(name, value, record["step"])
            if record["kind"] == "sample":
                writer.add_text(record["prompt"], record["text"], record["step"])

        yield tell


@contextlib.contextmanager
def _wandb(job: TrainJob) -> Iterator[Observer]:
    import wandb

    # The name is the identity, so that a resumed run goes on in its curves.
    run = wandb.init(
        project=job.wandb,
        name=job.run,
        id=job.run,
        resume="allow",
        config={"model": configs.to_json(job.model), "train": configs.to_json(job.train)},
    )
    try:
        yield lambda record: run.log(figures(record), step=record["step"])
    finally:
        run.finish()
