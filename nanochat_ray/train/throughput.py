"""Training throughput, measured in a few real steps before a run: its length follows from it.

CPUs differ by 50 times: bf16 is 2 times as fast as fp32 with AMX, and 18 times slower with AVX2
alone. And a machine may be busy with other work. So nothing is assumed: the workers take steps of
the run's own model, together, with the run's own batch. The resulting plan is stored beside the run
(``plan.json``), so that a resumed run has the same plan, on whatever machine and with however many
workers it continues.
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
from nanochat_ray.train.rank_sequences import rank_sequences
from nanochat_ray.train.step import Batch, train_step

logger = logging.getLogger(__name__)

SECONDS = 4.0
"""Of the steps that are measured together."""
LEAST_STEPS = 2
ROUNDS = 3
SLOW_STEP_S = 2.0
"""A first step that takes longer is the whole measurement."""
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
class Throughput:
    precision: Precision
    """The one of the probe, or the faster one."""
    tokens_per_s: float
    """Of all workers together."""

    def tokens_in(self, minutes: float) -> int:
        return int(minutes * 60 * SHARE_OF_STEPS * self.tokens_per_s)


def measure(probe: Probe, *, sharing: int = 1, seconds: float = SECONDS) -> Throughput:
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
        train = TrainConfig(steps=1, global_batch_size=world, micro_batch_size=1, precision=kind)
        # The fastest step: other work may come between, in one precision and not in the other.
        best_step = min(_step_seconds(probe.model, train, 0.0, sharing))
        rates[kind] = world * probe.model.sequence_len / _largest(best_step)
    best = max(rates, key=rates.__getitem__)
    throughput = Throughput(precision=best, tokens_per_s=rates[best])
    if not probe.minutes:
        return throughput
    # A faster machine gets larger batches, and these are faster: repeat until the batch is the one
    # that follows from its own throughput.
    train = _planned_config(probe, throughput, world)
    for _ in range(ROUNDS):
        times = _step_seconds(probe.model, train, seconds, sharing)
        tokens = train.global_batch_size * probe.model.sequence_len
        throughput = Throughput(
            precision=best, tokens_per_s=tokens * len(times) / _largest(sum(times))
        )
        before, train = train, _planned_config(probe, throughput, world)
        if train.global_batch_size == before.global_batch_size:
            break
    return throughput


def _planned_config(probe: Probe, throughput: Throughput, world: int) -> TrainConfig:
    tokens = min(throughput.tokens_in(probe.minutes), recipe.training_tokens(probe.model))
    return recipe.base_plan(
        probe.model,
        tokens=max(1, tokens),
        batch=probe.batch_tokens,
        micro_batch_size=probe.micro_batch_size,
        workers=world,
        precision=throughput.precision,
    ).train


def _step_seconds(
    config: ModelConfig, train: TrainConfig, seconds: float, sharing: int
) -> list[float]:
    """Seconds of steps of ``train``'s batch, measured for this many seconds and at least
    ``LEAST_STEPS`` steps; as many on each rank."""
    in_group = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if in_group else (0, 1)
    free = machine.free_memory(torch.device("cpu"), sharing)
    memory.check_memory(config, train, world=world, on_gpu=False, free=free)
    model = GPT(config, compute_dtype=DTYPES[train.precision])
    model.init_weights(torch.Generator().manual_seed(0))
    model.train()
    optimizer = ShardedOptimizer(model, train.optim, model.compute_dtype)
    num_sequences = len(rank_sequences(train, train.global_batch_size, 0, rank, world))
    shape = (num_sequences, config.sequence_len + 1)
    batch = Batch(np.random.default_rng(rank).integers(0, config.vocab_size, shape))
    times: list[float] = []
    while True:
        began = time.perf_counter()
        train_step(model, optimizer, batch, 0, train)
        times.append(time.perf_counter() - began)
        if len(times) == 1:  # it also sets everything up
            if _largest(times[0]) > SLOW_STEP_S:
                return times
            continue
        if len(times) > LEAST_STEPS and _largest(sum(times[1:])) >= seconds:
            return times[1:]


def _largest(value: float) -> float:
    """Over all ranks."""
    if not dist.is_initialized():
        return value
    maximum = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(maximum, op=dist.ReduceOp.MAX)
    return float(maximum)


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What a run's length was planned from."""

    precision: Precision
    tokens: int
    """To train on, in all."""
    batch_tokens: int
    cpu_minutes: float = 0.0
    """The bound that the user gave; 0 if the length came from something else."""
    tokens_per_s: float = 0.0
    """Measured, of all workers together; 0 if it was not."""
    workers: int = 0
    """Number of workers that the throughput was measured with."""


def stored_plan(run: Store, model: ModelConfig) -> RunPlan | None:
    """The plan of a run that exists; None if it has none, or only one of another model and no
    checkpoint."""
    try:
        content = json.loads(run.read_text(PLAN)) if run.exists(PLAN) else {}
        plan = RunPlan(**content["plan"]) if content else None
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s/%s is damaged and not used: %s", run.uri, PLAN, error)
        content, plan = {}, None
    if (name := checkpoint.latest(run)) is not None:
        train = checkpoint.load_trainer(run, name).get("train_config")
        if train is None:  # an imported run
            return plan
        size = train["global_batch_size"] * checkpoint.load_config(run, name).model.sequence_len
        facts = {
            "precision": train["precision"],
            "batch_tokens": size,
            "tokens": train["steps"] * size,
        }
        return dataclasses.replace(plan, **facts) if plan is not None else RunPlan(**facts)
    return plan if content.get("model") == configs.to_json(model) else None


def plan_length(
    run: Store,
    probe: Probe,
    tokens: int,
    workers: int,
    measure: Callable[[Probe], Throughput],
    store: bool = True,
) -> RunPlan:
    """The length of a run: its stored plan, or else the tokens that ``probe.minutes`` have room for
    by ``measure``, at most ``tokens``; 0 minutes are no bound.

    ValueError if a run with a checkpoint was planned for another time.
    """
    minutes, has_checkpoint = probe.minutes, checkpoint.latest(run) is not None
    plan = stored_plan(run, probe.model)
    if plan is not None and has_checkpoint and minutes and plan.cpu_minutes not in (0.0, minutes):
        raise ValueError(
            f"cpu_minutes={minutes:g} is not what this run was started with "
            f"({plan.cpu_minutes:g}): give the same value, or another run name"
        )
    if plan is not None and (has_checkpoint or plan.cpu_minutes == minutes):
        return plan
    throughput = measure(probe)
    if minutes:
        tokens = max(1, min(tokens, throughput.tokens_in(minutes)))
    batch_tokens = probe.batch_tokens
    if not batch_tokens:
        sequences = recipe.base_plan(probe.model, tokens=tokens).train.global_batch_size
        batch_tokens = sequences * probe.model.sequence_len
    plan = RunPlan(
        precision=throughput.precision,
        tokens=tokens,
        batch_tokens=batch_tokens,
        cpu_minutes=minutes,
        tokens_per_s=throughput.tokens_per_s if minutes else 0.0,
        workers=workers,
    )
    if store:
        store_plan(run, probe.model, plan)
    return plan


def store_plan(run: Store, model: ModelConfig, plan: RunPlan) -> None:
    """Writes the plan beside the run."""
    content = {"plan": dataclasses.asdict(plan), "model": configs.to_json(model)}
    run.write_text(PLAN, json.dumps(content, indent=1))
