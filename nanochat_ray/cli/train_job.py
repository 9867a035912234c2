"""From the flags of ``nanochat-ray train`` to the job that they describe."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

import torch

from nanochat_ray import container, machine
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import require
from nanochat_ray.cli.train import Args
from nanochat_ray.data.shards import Manifest
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.storage import Store
from nanochat_ray.train import hardware, memory, plan, recipe, throughput
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from nanochat_ray.train.data_loader import open_dataset

PLANNED_VOCABULARY = 32_768
"""What a plan counts with where no dataset is prepared (nanochat's)."""


def under_torchrun() -> bool:
    return "LOCAL_WORLD_SIZE" in os.environ


def planned_hardware(args: Args) -> hardware.Hardware:
    """What --hardware names, or what the machines have that will train. Raises ValueError."""
    if args.hardware:
        return hardware.by_name(args.hardware)
    if not args.gpus:
        return hardware.HARDWARE["cpu"]
    if torch.cuda.is_available():
        return hardware.detect(torch.device("cuda"))
    rule = "this machine has no CUDA device: name what to plan for with --hardware"
    require(not args.plan_only, "gpus", True, rule)
    return _cluster_gpu(args.workers)


@functools.cache
def _cluster_gpu(workers: int) -> hardware.Hardware:
    """The GPU of a worker: the machine that submits a job to a cluster may have none itself."""
    from nanochat_ray.on_ray import session

    session.connect()
    session.check_gpus(workers)
    return session.detect_gpu()


def base_model(args: Args, dataset: str) -> ModelConfig:
    """The transformer of --depth for a dataset; a plan does without one."""
    depth, preset = args.depth or 4, args.preset or "modern"
    is_prepared = Store.at(args.storage).child("datasets", dataset).exists("manifest.json")
    if args.plan_only and not is_prepared:
        return recipe.model_config(depth, PLANNED_VOCABULARY, preset=preset)
    _, manifest, tokenizer = open_dataset(args.storage, dataset)
    return recipe.model_config(
        depth,
        tokenizer.vocab_size,
        preset=preset,
        sequence_len=manifest.sequence_len,
    )


def measure(args: Args, probe: throughput.Probe) -> throughput.Throughput:
    """The speed of all workers together, where they will train."""
    if int(os.environ.get("RANK", 0)) == 0:
        print("measuring how fast this machine trains", flush=True)
    if args.ray and not args.plan_only and not under_torchrun():
        from nanochat_ray.on_ray import session
        from nanochat_ray.on_ray import throughput as on_ray

        session.connect()
        return on_ray.measure(probe, workers=args.min_workers or args.workers)
    torch.set_num_threads(args.threads)
    speed_here = throughput.measure(probe, sharing=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if args.plan_only:  # measured in this process alone: each worker that has cores does as much
        workers = max(1, min(args.workers, container.cores() // args.threads))
        return dataclasses.replace(speed_here, tokens_per_s=workers * speed_here.tokens_per_s)
    return speed_here


def plan_length(args: Args, model: ModelConfig, tokens: int, batch: int) -> throughput.RunPlan:
    """The length and precision of a run on a CPU. Raises ValueError."""
    probe = throughput.Probe(
        model=dataclasses.replace(model, **args.model),
        precision=args.precision,
        minutes=args.cpu_minutes or 0.0,
        batch_tokens=batch,
        micro_batch_size=args.train.get("micro_batch_size", 0),
        threads=args.threads,
    )
    run = Store.at(args.storage).child("runs", args.run_name)
    store = not args.plan_only and int(os.environ.get("RANK", 0)) == 0
    length = throughput.plan_length(
        run, probe, tokens, args.workers, lambda probe: measure(args, probe), store
    )
    if args.precision != "auto":
        return dataclasses.replace(length, precision=args.precision)
    return length


def parent_model(args: Args, parent: str) -> tuple[Store, ModelConfig]:
    """The run that this one starts from, and its model. Raises ValueError."""
    run = Store.at(args.storage).child("runs", parent)
    if checkpoint.latest(run) is None:
        raise ValueError(f"parent={parent!r} has no checkpoint in {args.storage}")
    return run, checkpoint.load_config(run).model


BATCH_FIELDS = ("global_batch_size", "micro_batch_size")
"""Fields of TrainConfig that the recipe takes into account, for all else that depends on them."""


def batch_tokens(args: Args, model: ModelConfig) -> int:
    """Tokens of a global batch that the flags name; 0 leaves it to the recipe."""
    return args.train.get("global_batch_size", 0) * model.sequence_len or args.batch_tokens


def base_train(args: Args, model: ModelConfig) -> tuple[TrainConfig, float]:
    """Also gives the tokens per second that were measured, or 0."""
    tokens = args.tokens or 0
    tokens_per_param = args.tokens_per_param or recipe.TOKENS_PER_PARAMETER
    precision, batch, tokens_per_s = args.precision, batch_tokens(args, model), 0.0
    budget = tokens or recipe.training_tokens(model, tokens_per_param)
    # One step of such a batch could take hundreds of times as long as the run.
    is_short = batch <= max(budget, args.workers * model.sequence_len)
    require(is_short, "batch_tokens", batch, f"up to the {budget:,} tokens of the whole run")
    if not args.gpus and args.cpu_minutes and not tokens:
        length = plan_length(args, model, budget, batch)
        tokens, batch, precision = length.tokens, batch or length.batch_tokens, length.precision
        tokens_per_s = length.tokens_per_s
    elif not args.gpus and precision == "auto" and not args.plan_only:
        unbounded_args = dataclasses.replace(args, cpu_minutes=0.0)
        precision = plan_length(unbounded_args, model, tokens or 1, batch).precision
    train = recipe.base_plan(
        model,
        tokens=tokens,
        tokens_per_param=tokens_per_param,
        batch=batch,
        micro_batch_size=args.train.get("micro_batch_size", 0),
        workers=args.workers,
        precision="bf16" if precision == "auto" else precision,
    ).train
    return train, tokens_per_s


def sft_train(args: Args, parent: Store, dataset: str) -> tuple[TrainConfig, float]:
    """Also gives the tokens per second that were measured, or 0."""
    model = checkpoint.load_config(parent).model
    _, manifest, _ = open_dataset(args.storage, dataset)
    num_sequences, precision = manifest.num_sequences("train"), args.precision
    if precision == "auto":
        before = checkpoint.load_trainer(parent).get("train_config", {})
        precision = "bf16" if args.gpus else before.get("precision", "fp32")
    sizes = {
        "batch": batch_tokens(args, model),
        "micro_batch_size": args.train.get("micro_batch_size", 0),
        "workers": args.workers,
        "on_gpu": args.gpus,
    }
    epochs = args.epochs or 1.0
    train = recipe.sft_config(model, num_sequences, epochs=epochs, precision=precision, **sizes)
    if args.gpus or not args.cpu_minutes:
        return train, 0.0
    size = train.global_batch_size * model.sequence_len
    bounded_args = dataclasses.replace(args, precision=precision)
    length = plan_length(bounded_args, model, train.steps * size, size)
    sizes["batch"] = length.batch_tokens
    epochs = length.tokens / (num_sequences * model.sequence_len)
    train = recipe.sft_config(model, num_sequences, epochs=epochs, precision=precision, **sizes)
    return train, length.tokens_per_s


PARENT_FLAGS = ("dropout", "document_start", "rope_factor")
"""Fields of a parent's model that a run may change: no weight depends on them."""


def check_parent_flags(args: Args, model: ModelConfig) -> None:
    """ValueError if ``--model.*`` changes a parent's model where its weights depend on it."""
    for name, value in args.model.items():
        is_allowed = name in PARENT_FLAGS or value == getattr(model, name)
        flag = f"--model.{name.replace('_', '-')}"
        require(is_allowed, flag, value, f"a parent's model has {name}={getattr(model, name)}")


def build(args: Args) -> TrainerConfig:
    """The job that the flags describe. Raises ValueError."""
    dataset = args.dataset or args.stage
    parent = args.parent or ("base" if args.stage == "sft" else "")
    if args.stage == "sft":
        store, model = parent_model(args, parent)
        train, tokens_per_s = sft_train(args, store, dataset)
    else:
        if parent == args.run_name:
            raise ValueError(f"parent={parent!r} is not allowed: another run than --run")
        model = parent_model(args, parent)[1] if parent else base_model(args, dataset)
        train, tokens_per_s = base_train(args, model)
    if parent:
        check_parent_flags(args, model)
    rest = {name: value for name, value in args.train.items() if name not in BATCH_FIELDS}
    optim = dataclasses.replace(train.optim.with_scaled_lr(args.lr_scale), **args.optim)
    model = dataclasses.replace(model, **args.model)
    train = dataclasses.replace(train, optim=optim, **rest)
    if "micro_batch_size" not in args.train:
        # With the flags that memory depends on, such as checkpoint_activations.
        gpu = planned_hardware(args)
        train = plan.fit_micro_batch(model, train, workers=args.workers, hardware=gpu)
    return TrainerConfig(
        storage=args.storage,
        dataset=dataset,
        run=args.run_name,
        model=model,
        train=train,
        parent=parent,
        tensorboard=args.tensorboard,
        wandb=args.wandb,
        about={"tokens_per_s": tokens_per_s} if tokens_per_s else {},
    )


def print_plan(job: TrainerConfig, args: Args) -> dict[str, Any]:
    """Prints the plan; returns it with what memory says of it."""
    machines = planned_hardware(args)
    dataset = Store.at(job.storage).child("datasets", job.dataset)
    num_sequences = 0
    if dataset.exists("manifest.json"):
        num_sequences = Manifest.load(dataset).num_sequences("train")
    plan_fields = plan.describe(
        job.model,
        job.train,
        workers=args.workers,
        hardware=machines,
        tokens_per_s=job.about.get("tokens_per_s", 0.0),
        num_sequences=num_sequences,
    )
    print(f"{plan.render(plan_fields)}\nstorage   {job.storage}, run {job.run}", flush=True)
    # Workers on CPUs share this machine.
    free = machines.memory or machine.free_memory(torch.device("cpu"), args.workers)
    try:
        memory.check_memory(
            job.model, job.train, world=args.workers, on_gpu=machines.is_gpu, free=free
        )
    except memory.DoesNotFitError as error:
        return {**plan_fields, "fits": False, "advice": str(error)}
    return {**plan_fields, "fits": True, "advice": ""}
