"""Measure the parts of a step of reinforcement learning, and what rehearsal adds to it.

    nanochat-ray bench rl-step --parent chat

A run in this process, whose files are removed at the end. Before each step the gradient of its
batch is computed twice more, with the rehearsed conversations and without, in turns. Seconds are
CPU time of the process, which other programs hardly change. The last line is one JSON object.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nanochat_ray.checks import check_int, check_name
from nanochat_ray.cli import rl
from nanochat_ray.rl.rehearsal import Rehearsal
from nanochat_ray.rl.source import RolloutSource, StepRollouts
from nanochat_ray.storage import Store, absolute, default_root
from nanochat_ray.train.step import Batch, split
from nanochat_ray.train.trainer import Trainer

RUN = "bench-rl-step"


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    parent: str = "chat"
    """Fine-tuned run whose conversations the storage has."""
    steps: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        check_name("parent", self.parent)
        check_int("steps", self.steps, 2)
        check_int("seed", self.seed, 0)


class Parts(NamedTuple):
    """CPU seconds of a step; the gradient is a part of training."""

    rollouts: float
    training: float
    gradient: float
    gradient_without: float


class TimedSource(RolloutSource):
    parts: list[Parts]

    def _make_batch(self, step: int, rollouts: StepRollouts) -> Batch:
        batch = super()._make_batch(step, rollouts)
        rehearsal = self.rehearsal
        self.rehearsal = Rehearsal(reader=None, weight=0.0, seed=0, bos=0, max_len=0)
        self.plain_batch = super()._make_batch(step, rollouts)
        self.rehearsal = rehearsal
        return batch

    def batches(self, start: int) -> Iterator[Batch]:
        self.parts = []
        begin = time.process_time()
        for step, batch in enumerate(super().batches(start)):
            rollouts = time.process_time() - begin
            both = (batch, self.plain_batch)
            seconds = {}
            for index in (0, 1) if step % 2 else (1, 0):
                begin = time.process_time()
                self._add_gradient(both[index])
                seconds[index] = time.process_time() - begin
            begin = time.process_time()
            yield batch
            training = time.process_time() - begin
            self.parts.append(Parts(rollouts, training, seconds[0], seconds[1]))
            begin = time.process_time()

    def _add_gradient(self, batch: Batch) -> None:
        """The step itself begins with zeros again."""
        for micro in split(batch, self.config.train.micro_batch_size, torch.device("cpu")):
            self.objective.loss(self.model, micro).backward()
        self.objective.finish()


def measure(args: Args) -> list[Parts]:
    """The first step, which takes memory from the system, is left out, and the last one, which
    writes a checkpoint."""
    steps = args.steps + 2
    train = {"seed": args.seed, "eval_every": steps, "save_every": steps}
    flags = rl.Args(
        storage=args.storage, parent=args.parent, run=RUN, steps=steps, ray=False, train=train
    )
    torch.set_num_threads(1)
    runs = Store.at(args.storage).child("runs")
    runs.delete(RUN)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = rl.build(flags)
        source = TimedSource(config, flags.rl_config(), rl.engine_config(flags))
        Trainer(config, source=source).run()
    finally:
        runs.delete(RUN)
    return source.parts[1:]


def figures(parts: list[Parts]) -> dict[str, float]:
    """Means of a step. ``rehearsal_share``: of the whole step with it."""
    rollouts, training, gradient, without = (
        statistics.mean(values) for values in zip(*parts, strict=True)
    )
    return {
        "rollouts_s": rollouts,
        "training_s": training,
        "gradient_s": gradient,
        "gradient_without_s": without,
        "rehearsal_share": (gradient - without) / (rollouts + training),
    }


def main(args: Args) -> None:
    result = figures(measure(args))
    for name, value in result.items():
        print(f"{name:<20} {value:7.1%}" if "share" in name else f"{name:<20} {value:7.3f}")
    print(json.dumps({"steps": args.steps, **result}))
