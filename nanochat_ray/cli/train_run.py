"""Runs the job of ``nanochat-ray train``: on Ray, in this process, or as a rank of torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from nanochat_ray.claim import Claim, hold_claim
from nanochat_ray.cli import supervise
from nanochat_ray.cli.train import Args
from nanochat_ray.cli.train_job import build, print_plan, under_torchrun
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainerConfig
from nanochat_ray.train.hooks import Hooks
from nanochat_ray.train.loggers import ProgressPrinter
from nanochat_ray.train.metrics import duration
from nanochat_ray.train.preflight import check, check_resume
from nanochat_ray.train.source import Source
from nanochat_ray.train.stop import STOPPED, StopOnSignal
from nanochat_ray.train.trainer import Trainer

has_joined_group = False
"""Whether this process has been one of several ranks of torchrun."""


def run_here(job: TrainerConfig, args: Args) -> dict[str, Any]:
    """Trains in this process, or as one rank of ``torchrun``."""
    torch.set_num_threads(args.threads)
    return train_here(job, gpus=args.gpus, print_every=args.print_every)


def train_here(
    job: TrainerConfig, *, gpus: bool, print_every: int, source: Source | None = None
) -> dict[str, Any]:
    """Claims the run and trains it; ``source`` replaces the reading of its dataset."""
    rank = int(os.environ.get("RANK", 0))
    device = torch.device("cpu")
    if gpus:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    root = Store.at(job.storage)
    # Of torchrun's ranks the first claims the run for all.
    claim = hold_claim(root, "runs", job.run) if rank == 0 else contextlib.nullcontext()
    with claim as mine, StopOnSignal() as on_signal:
        hooks: list[Hooks] = [_ProcessHooks(on_signal, mine)]
        if rank == 0:
            hooks.append(ProgressPrinter(print_every))
        trainer = Trainer(
            job,
            device=device,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
            source=source,
            hooks=hooks,
        )
        return trainer.run()


class _ProcessHooks(Hooks):
    """Stops at a signal; publishes only while the claim on the run is this process's."""

    def __init__(self, on_signal: StopOnSignal, claim: Claim | None):
        self._on_signal, self._claim = on_signal, claim

    def should_stop(self) -> bool:
        return self._on_signal.stop.is_set()

    def check_publish(self) -> None:
        if self._claim is not None:
            self._claim.check()


@contextlib.contextmanager
def process_group(*, gpus: bool) -> Iterator[None]:
    """torchrun's, if this is one of several ranks."""
    import torch.distributed as dist

    if not under_torchrun() or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    if gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    global has_joined_group
    has_joined_group = True
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_on_ray(job: TrainerConfig, args: Args) -> dict[str, Any]:
    from nanochat_ray.on_ray import session

    # Ray Train is imported while Ray starts.
    with ThreadPoolExecutor(1) as thread:
        importing = thread.submit(importlib.import_module, "nanochat_ray.on_ray.train")
        session.connect()
        session.check_gpus(args.workers if args.gpus else 0)
        importing.result()
    from nanochat_ray.on_ray.train import fit

    return fit(
        job,
        workers=args.workers,
        min_workers=args.min_workers,
        gpus=args.gpus,
        threads=args.threads,
        print_every=args.print_every,
    )


def run(args: Args) -> int:
    with contextlib.nullcontext() if args.plan_only else process_group(gpus=args.gpus):
        return train(args)


def train(args: Args) -> int:
    if under_torchrun():
        args = dataclasses.replace(args, workers=int(os.environ["WORLD_SIZE"]))
    elif not args.ray and not args.plan_only:
        args = dataclasses.replace(args, workers=1)
    job = build(args)
    first = int(os.environ.get("RANK", 0)) == 0
    if args.plan_only:
        plan_fields = print_plan(job, args)
        if plan_fields["advice"]:
            print(f"memory    does not fit: {plan_fields['advice']}")
        print(json.dumps(plan_fields))
        return 0
    job = check(job, on_gpu=args.gpus)
    if not supervise.continues_run():
        check_resume(job.storage, job.run, args.resume)
    if first:
        print_plan(job, args)
    here = under_torchrun() or not args.ray
    result = run_here(job, args) if here else run_on_ray(job, args)
    if first:
        print(f"trained in {duration(result.get('train_seconds', 0.0))}")
        print(json.dumps({"run": job.run, **result}))
    return 0 if result["done"] else STOPPED
