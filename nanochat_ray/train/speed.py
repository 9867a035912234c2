"""How fast this machine trains: a few real steps before a run, from which its length is planned.

CPUs differ by 50 times in what torch makes of them: bf16 is 2 times as fast as fp32 with AMX, and
18 times slower with AVX2 alone. And a machine may be busy with other work. So nothing is assumed:
the workers take steps of the run's own model, together, with the run's own batch. What follows is
stored beside the run (``plan.json``), so that a resumed run has the same plan, on whatever machine
and with however many workers it continues.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from nanochat_ray import config as configs
from nanochat_ray import machine
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.model.config import ModelConfig, Precision
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import DTYPES
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.storage import Store
from nanochat_ray.train import memory, recipe
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.data_loader import rank_sequences
from nanochat_ray.train.step import Batch, train_step

logger = logging.getLogger(__name__)

SECONDS = 4.0
"""Of the steps that are measured together."""
LEAST_STEPS = 2
ROUNDS = 3
PATIENCE = 2.0
"""A first step that takes longer in seconds says enough by itself."""
SHARE_OF_STEPS = 0.9
"""Of a run's time. The rest is validation (4 times 4 to 5 s at depth 4 on two busy cores),
checkpoints and texts."""
PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What to measure. ``batch_tokens`` and ``micro_batch_size`` of 0 follow the scaling rule for
    the tokens that ``minutes`` have room for; ``minutes`` of 0 compare precisions alone."""

    model: ModelConfig
    precision: Precision | Literal["auto"] = "auto"
    minutes: float = 0.0
    batch_tokens: int = 0
    micro_batch_size: int = 0
    threads: int = 1

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Probe:
        return cls(**{**values, "model": configs.from_json(ModelConfig, values["model"])})


@dataclass(frozen=True, kw_only=True)
class Speed:
    precision: Precision
    """What was asked for, or the faster one."""
    tokens_per_s: float
    """Of all workers together."""

    def tokens_in(self, minutes: float) -> int:
        return int(minutes * 60 * SHARE_OF_STEPS * self.tokens_per_s)


def measure(probe: Probe, *, sharing: int = 1, seconds: float = SECONDS) -> Speed:
    """Takes training steps on random tokens. Collective over the process group, if any: all ranks
    return the same.

    ``sharing`` is the number of workers on this machine. DoesNotFitError if memory is too small.
    """
    kinds: tuple[Precision, ...] = ("bf16", "fp32")
    if probe.precision != "auto":
        kinds = (probe.precision,)
    world = dist.get_world_size() if dist.is_initialized() else 1
    rates = {}
    for kind in kinds:
        row = TrainConfig(steps=1, global_batch_size=world, micro_batch_size=1, precision=kind)
        # The fastest step: other work may come between, in one precision and not in the other.
        best_step = min(_step_seconds(probe.model, row, 0.0, sharing))
        rates[kind] = world * probe.model.sequence_len / _largest(best_step)
    best = max(rates, key=rates.__getitem__)
    speed = Speed(precision=best, tokens_per_s=rates[best])
    if not probe.minutes:
        return speed
    # A faster machine has larger batches, and these are faster: until the batch is the one that
    # follows from its own speed.
    train = _planned(probe, speed, world)
    for _ in range(ROUNDS):
        times = _step_seconds(probe.model, train, seconds, sharing)
        tokens = train.global_batch_size * probe.model.sequence_len
        speed = Speed(precision=best, tokens_per_s=tokens * len(times) / _largest(sum(times)))
        before, train = train, _planned(probe, speed, world)
        if train.global_batch_size == before.global_batch_size:
            break
    return speed


def _planned(probe: Probe, speed: Speed, world: int) -> TrainConfig:
    tokens = min(speed.tokens_in(probe.minutes), recipe.training_tokens(probe.model))
    return recipe.base_plan(
        probe.model,
        tokens=max(1, tokens),
        batch=probe.batch_tokens,
        micro_batch_size=probe.micro_batch_size,
        workers=world,
        precision=speed.precision,
    ).train


def _step_seconds(
    config: ModelConfig, train: TrainConfig, seconds: float, sharing: int
) -> list[float]:
    """What steps of ``train``'s batch take, for so many seconds and ``LEAST_STEPS`` at least; as
    many on each rank."""
    distributed = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)
    free = machine.free_memory(torch.device("cpu"), sharing)
    memory.check_memory(config, train, world=world, on_gpu=False, free=free)
    model = GPT(config, compute_dtype=DTYPES[train.precision])
    model.init_weights(torch.Generator().manual_seed(0))
    model.train()
    optimizer = ShardedOptimizer(model, train.optim, model.compute_dtype)
    rows = len(rank_sequences(train, train.global_batch_size, 0, rank, world))
    shape = (rows, config.sequence_len + 1)
    batch = Batch(np.random.default_rng(rank).integers(0, config.vocab_size, shape))
    times: list[float] = []
    while True:
        began = time.perf_counter()
        train_step(model, optimizer, batch, 0, train)
        times.append(time.perf_counter() - began)
        if len(times) == 1:  # it also sets everything up
            if _largest(times[0]) > PATIENCE:
                return times
            continue
        if len(times) > LEAST_STEPS and _largest(sum(times[1:])) >= seconds:
            return times[1:]


def _largest(value: float) -> float:
    """Over all ranks."""
    if not dist.is_initialized():
        return value
    agreed = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return float(agreed)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run's length was planned from."""

    precision: Precision
    tokens: int
    """To train on, in all."""
    batch_tokens: int
    cpu_minutes: float = 0.0
    """What was asked for; 0 if the length came from something else."""
    tokens_per_s: float = 0.0
    """Measured, of all workers together; 0 if it was not."""
    workers: int = 0
    """With which it was measured."""


def stored_plan(run: Store, model: ModelConfig) -> RunPlan | None:
    """The plan of a run that was begun; None if there is none, or only one of another model that
    has not come to a checkpoint."""
    try:
        notes = json.loads(run.read_text(PLAN)) if run.exists(PLAN) else {}
        noted = RunPlan(**notes["plan"]) if notes else None
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s/%s is damaged and not used: %s", run.uri, PLAN, error)
        notes, noted = {}, None
    if (name := checkpoint.latest(run)) is not None:
        train = checkpoint.load_trainer(run, name).get("train_config")
        if train is None:  # it was imported
            return noted
        size = train["global_batch_size"] * checkpoint.load_config(run, name).model.sequence_len
        facts = {
            "precision": train["precision"],
            "batch_tokens": size,
            "tokens": train["steps"] * size,
        }
        return dataclasses.replace(noted, **facts) if noted is not None else RunPlan(**facts)
    return noted if notes.get("model") == configs.to_json(model) else None


def plan_length(
    run: Store,
    probe: Probe,
    tokens: int,
    workers: int,
    measure: Callable[[Probe], Speed],
    store: bool = True,
) -> RunPlan:
    """The length of a run: as it was planned when it began, or else what ``probe.minutes`` have
    room for by ``measure``, at most ``tokens``; 0 minutes are no bound.

    ValueError if a run with a checkpoint was planned for another time.
    """
    minutes, begun = probe.minutes, checkpoint.latest(run) is not None
    stored = stored_plan(run, probe.model)
    if stored is not None and begun and minutes and stored.cpu_minutes not in (0.0, minutes):
        raise ValueError(
            f"cpu_minutes={minutes:g} is not what this run was started with "
            f"({stored.cpu_minutes:g}): give the same value, or another run name"
        )
    if stored is not None and (begun or stored.cpu_minutes == minutes):
        return stored
    found = measure(probe)
    if minutes:
        tokens = max(1, min(tokens, found.tokens_in(minutes)))
    size = probe.batch_tokens
    if not size:
        rows = recipe.base_plan(probe.model, tokens=tokens).train.global_batch_size
        size = rows * probe.model.sequence_len
    made = RunPlan(
        precision=found.precision,
        tokens=tokens,
        batch_tokens=size,
        cpu_minutes=minutes,
        tokens_per_s=found.tokens_per_s if minutes else 0.0,
        workers=workers,
    )
    if store:
        store_plan(run, probe.model, made)
    return made


def store_plan(run: Store, model: ModelConfig, plan: RunPlan) -> None:
    notes = {"plan": dataclasses.asdict(plan), "model": configs.to_json(model)}
    run.write_text(PLAN, json.dumps(notes, indent=1))
