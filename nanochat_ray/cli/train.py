"""Train a base model, or fine-tune one to chat.

nanochat-ray train --storage DIR --dataset base --run base --depth 4
nanochat-ray train --storage DIR --stage sft --dataset sft --run chat --parent base
nanochat-ray train --dataset more --run more --parent base     # continued pre-training
nanochat-ray train --depth 20 --hardware h100 --workers 8 --plan-only   # what would it take?
ray job submit -- nanochat-ray train ...             # on a cluster: Ray Train and Ray Data
torchrun --nproc-per-node 2 -m nanochat_ray train ...  # the same loop without Ray
nanochat-ray train --no-ray ...                   # and in this process

The last line is one JSON object. Exit status: 0 the run is at its end (or the plan is printed);
75 it was asked to stop (SIGTERM or Ctrl-C) and left a checkpoint, so run the same command again;
2 what was asked for is not possible; 1 anything else, such as a gradient that stays not finite.
torchrun passes SIGTERM on and waits 30 s, and its own status is 1 whatever its workers say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from nanochat_ray import machine
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import check_float, check_int, check_name, require
from nanochat_ray.claim import Claim, hold_claim
from nanochat_ray.config import to_json, with_options
from nanochat_ray.data.shards import Manifest
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.storage import Store, absolute, default_root
from nanochat_ray.train import hardware, memory, plan, recipe, speed
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from nanochat_ray.train.data_loader import open_dataset
from nanochat_ray.train.hooks import Hooks
from nanochat_ray.train.loggers import ProgressPrinter
from nanochat_ray.train.metrics import duration
from nanochat_ray.train.preflight import Resume, check, check_resume
from nanochat_ray.train.stop import STOPPED, StopOnSignal
from nanochat_ray.train.trainer import Trainer

BASE_FLAGS = ("depth", "preset", "ratio", "tokens")
"""Fine-tuning takes the model from its parent and the tokens from its dataset."""
SFT_FLAGS = ("epochs",)
MODEL_FLAGS = ("depth", "preset")
"""What a parent has already."""
PRESETS = ("modern", "classic")
MAX_INT = 2**62
PLANNED_VOCABULARY = 32_768
"""What a plan counts with where no dataset is prepared (nanochat's)."""


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds datasets, tokenizers and runs."""
    stage: Literal["base", "sft"] = "base"
    dataset: str = ""
    """Name of a prepared dataset; by default that of the stage."""
    run: str = ""
    """Name of the run; by default "base" or "chat"."""
    resume: Resume = "auto"
    """auto goes on with a run that exists and begins one that does not; never and must refuse."""
    parent: str | None = None
    """Run whose weights this one starts from: for sft by default "base", for base by default none
    (--parent continues its pre-training, on a dataset with its tokenizer)."""
    depth: int | None = None
    """Layers, by default 4; all else follows from it (base)."""
    preset: str | None = None
    """modern (the default) or classic (base)."""
    ratio: float | None = None
    """Tokens to train on for each parameter of blocks and head, by default 12 (base)."""
    tokens: int | None = None
    """Tokens to train on; by default they follow the ratio (base)."""
    cpu_minutes: float | None = None
    """On a CPU: no more tokens than about so many minutes take, by the speed that is measured at
    the start; by default no bound. A run that goes on keeps the plan that it began with."""
    batch_tokens: int = 0
    """Tokens of a global batch; 0 follows the scaling rule."""
    epochs: float | None = None
    """Passes over the data, by default 1 (sft)."""
    micro_batch_size: int = 0
    """Rows of one forward pass of one worker; 0 chooses."""
    lr_scale: float = 1.0
    """Factor on every learning rate."""
    workers: int = 2
    min_workers: int = 0
    """With Ray, go on with so few when machines are lost, and with more when they come back; 0
    waits for all."""
    gpus: bool = False
    """One GPU for each worker."""
    threads: int = 1
    """Torch threads of a worker on the CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is bf16 on GPUs, and on a CPU the faster one, measured (sft: that of its parent)."""
    seed: int = 0
    options: list[str] = field(default_factory=list)
    """Any field of ModelConfig, TrainConfig and OptimConfig (config.py of each room) as name=value,
    for example skips=true window_pattern=SSSL momentum=0.9 fp8=true compile=true."""
    checkpoint_activations: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, more
    time."""
    deterministic: bool = False
    """Only operations that give the same bits each time."""
    spike_clip: float = 0.0
    """Cut a gradient norm down that is above so many times the usual one; 0 is off."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves a quarter of the run apart."""
    keep_latest_k: int = 2
    """Newest checkpoints that are kept, beside the best by validation."""
    print_every: int = 10
    sample_tokens: int = 48
    """Length of the texts that are written at each validation; 0 is none."""
    tensorboard: str = ""
    """Folder for TensorBoard's files, on the machine of the first worker."""
    wandb: str = ""
    """Project at Weights & Biases."""
    ray: bool = True
    """Train with Ray Train; --no-ray stays in this process (torchrun implies it)."""
    hardware: str = ""
    """What to plan for: h100, h200, a100, cpu, ...; by default what is found here."""
    plan_only: bool = False
    """Print what would be trained and what it would take, and stop."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        for name in ("dataset", "run"):
            if getattr(self, name):
                check_name(name, getattr(self, name))
        if self.parent is not None:
            check_name("parent", self.parent)
        other, flags = ("base", BASE_FLAGS) if self.stage == "sft" else ("sft", SFT_FLAGS)
        for name in flags:
            flag = f"--{name.replace('_', '-')}"
            allowed = f"only with --stage {other}"
            require(getattr(self, name) is None, flag, getattr(self, name), allowed)
        for name in MODEL_FLAGS if self.parent is not None else ():
            value, flag = getattr(self, name), f"--{name}"
            require(value is None, flag, value, "not with --parent, which has its own model")
        if self.preset is not None:
            allowed = f"one of {', '.join(PRESETS)}"
            require(self.preset in PRESETS, "preset", self.preset, allowed)
        for name, least in (
            *(
                ("depth", 1),
                ("tokens", 0),
                ("batch_tokens", 0),
                ("micro_batch_size", 0),
                ("workers", 1),
            ),
            *(
                ("min_workers", 0),
                ("threads", 1),
                ("seed", 0),
                ("save_every", 0),
                ("keep_latest_k", 1),
            ),
            *(("print_every", 1), ("sample_tokens", 0)),
        ):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least, MAX_INT)
        allowed = f"up to the {self.workers} workers"
        require(self.min_workers <= self.workers, "min_workers", self.min_workers, allowed)
        for name in ("ratio", "epochs", "lr_scale"):
            if getattr(self, name) is not None:
                check_float(name, getattr(self, name), above=True)
        for name in ("cpu_minutes", "spike_clip"):
            if getattr(self, name) is not None:
                check_float(name, getattr(self, name))
        if self.hardware:
            hardware.named(self.hardware)
        if self.gpus and not self.ray and not self.plan_only:
            require(torch.cuda.is_available(), "gpus", True, "this machine has no CUDA device")


def planned_hardware(args: Args) -> hardware.Hardware:
    """What --hardware names, or what this machine has. Raises ValueError."""
    if args.hardware:
        return hardware.named(args.hardware)
    if not args.gpus:
        return hardware.HARDWARE["cpu"]
    found = hardware.detect(torch.device("cuda")) if torch.cuda.is_available() else None
    # The machine that submits a job to a cluster may have no GPU itself.
    return found or hardware.HARDWARE["h100"]


def base_model(args: Args, dataset: str) -> ModelConfig:
    """The transformer of --depth for a dataset; a plan does without one."""
    depth, preset = args.depth or 4, args.preset or "modern"
    prepared = Store.at(args.storage).child("datasets", dataset).exists("manifest.json")
    if args.plan_only and not prepared:
        return recipe.model_config(depth, PLANNED_VOCABULARY, preset=preset)
    _, manifest, tokenizer = open_dataset(args.storage, dataset)
    return recipe.model_config(
        depth,
        tokenizer.vocab_size,
        preset=preset,
        sequence_len=manifest.sequence_len,
    )


def measure(args: Args, probe: speed.Probe) -> speed.Speed:
    """The speed of all workers together, where they will train."""
    if int(os.environ.get("RANK", 0)) == 0:
        print("measuring how fast this machine trains", flush=True)
    if args.ray and not args.plan_only and not under_torchrun():
        from nanochat_ray.on_ray import session
        from nanochat_ray.on_ray import speed as on_ray

        session.connect()
        return on_ray.measure(probe, workers=args.min_workers or args.workers)
    torch.set_num_threads(args.threads)
    found = speed.measure(probe, sharing=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if args.plan_only:  # in this process alone: others get as much each, while there are cores
        many = max(1, min(args.workers, machine.cores() // args.threads))
        return dataclasses.replace(found, tokens_per_s=many * found.tokens_per_s)
    return found


def plan_length(args: Args, model: ModelConfig, tokens: int, batch_tokens: int) -> speed.RunPlan:
    """The length and precision of a run on a CPU. Raises ValueError."""
    shaped, _ = with_options(model, args.options)
    probe = speed.Probe(
        model=shaped,
        precision=args.precision,
        minutes=args.cpu_minutes or 0.0,
        batch_tokens=batch_tokens,
        micro_batch_size=args.micro_batch_size,
        threads=args.threads,
    )
    run = Store.at(args.storage).child("runs", run_name(args))
    store = not args.plan_only and int(os.environ.get("RANK", 0)) == 0
    found = speed.plan_length(
        run, probe, tokens, args.workers, lambda probe: measure(args, probe), store
    )
    if args.precision != "auto":
        return dataclasses.replace(found, precision=args.precision)
    return found


def parent_model(args: Args, parent: str) -> tuple[Store, ModelConfig]:
    """The run that this one starts from, and its model. Raises ValueError."""
    run = Store.at(args.storage).child("runs", parent)
    if checkpoint.latest(run) is None:
        raise ValueError(f"parent={parent!r} has no checkpoint in {args.storage}")
    return run, checkpoint.load_config(run).model


def base_train(args: Args, model: ModelConfig) -> tuple[TrainConfig, float]:
    """Also gives the tokens per second that were measured, or 0."""
    tokens, ratio = args.tokens or 0, args.ratio or recipe.TOKENS_PER_PARAMETER
    precision, batch, tokens_per_s = args.precision, args.batch_tokens, 0.0
    if not args.gpus and args.cpu_minutes and not tokens:
        found = plan_length(args, model, recipe.training_tokens(model, ratio), batch)
        tokens, batch, precision = found.tokens, batch or found.batch_tokens, found.precision
        tokens_per_s = found.tokens_per_s
    elif not args.gpus and precision == "auto" and not args.plan_only:
        unbounded = dataclasses.replace(args, cpu_minutes=0.0)
        precision = plan_length(unbounded, model, tokens or 1, batch).precision
    train = recipe.base_plan(
        model,
        tokens=tokens,
        tokens_per_param=ratio,
        batch=batch,
        micro_batch_size=args.micro_batch_size,
        workers=args.workers,
        precision="bf16" if precision == "auto" else precision,
        seed=args.seed,
    ).train
    if not args.micro_batch_size:
        gpu = planned_hardware(args)
        train = plan.fit_micro_batch(model, train, workers=args.workers, hardware=gpu)
    return train, tokens_per_s


def sft_train(args: Args, parent: Store, dataset: str) -> tuple[TrainConfig, float]:
    """Also gives the tokens per second that were measured, or 0."""
    model = checkpoint.load_config(parent).model
    _, manifest, _ = open_dataset(args.storage, dataset)
    rows, precision = manifest.num_sequences("train"), args.precision
    if precision == "auto":
        before = checkpoint.load_trainer(parent).get("train_config", {})
        precision = "bf16" if args.gpus else before.get("precision", "fp32")
    sizes = {
        "batch": args.batch_tokens,
        "micro_batch_size": args.micro_batch_size,
        "workers": args.workers,
        "seed": args.seed,
    }
    epochs = args.epochs or 1.0
    train = recipe.sft_config(model, rows, epochs=epochs, precision=precision, **sizes)
    if args.gpus or not args.cpu_minutes:
        return train, 0.0
    size = train.global_batch_size * model.sequence_len
    bounded = dataclasses.replace(args, precision=precision)
    found = plan_length(bounded, model, train.steps * size, size)
    sizes["batch"] = found.batch_tokens
    epochs = found.tokens // model.sequence_len / rows
    train = recipe.sft_config(model, rows, epochs=epochs, precision=precision, **sizes)
    return train, found.tokens_per_s


def build(args: Args) -> TrainerConfig:
    """The job that the flags describe. Raises ValueError."""
    dataset = args.dataset or args.stage
    parent = args.parent or ("base" if args.stage == "sft" else "")
    if args.stage == "sft":
        store, model = parent_model(args, parent)
        train, tokens_per_s = sft_train(args, store, dataset)
    else:
        if parent == run_name(args):
            raise ValueError(f"parent={parent!r} is not allowed: another run than --run")
        model = parent_model(args, parent)[1] if parent else base_model(args, dataset)
        train, tokens_per_s = base_train(args, model)
    train = dataclasses.replace(
        train,
        optim=train.optim.with_scaled_lr(args.lr_scale),
        save_every=args.save_every or train.save_every,
        keep_latest_k=args.keep_latest_k,
        checkpoint_activations=args.checkpoint_activations,
        deterministic=args.deterministic,
        spike_clip=args.spike_clip,
        sample_tokens=args.sample_tokens,
    )
    shaped, options = with_options(model, args.options)
    if parent:
        changed = {name for name, value in to_json(model).items() if getattr(shaped, name) != value}
        if wrong := sorted(changed - {"dropout", "document_start", "rope_factor"}):
            raise ValueError(f"options: {wrong[0]} of a parent's model cannot be changed")
    model = shaped
    train, options = with_options(train, options)
    optim, options = with_options(train.optim, options)
    if options:
        raise ValueError(
            f"options={options[0]!r} is not allowed: no configuration has such a field"
        )
    train = dataclasses.replace(train, optim=optim)
    return TrainerConfig(
        storage=args.storage,
        dataset=dataset,
        run=run_name(args),
        model=model,
        train=train,
        parent=parent,
        tensorboard=args.tensorboard,
        wandb=args.wandb,
        about={"tokens_per_s": tokens_per_s} if tokens_per_s else {},
    )


def run_name(args: Args) -> str:
    return args.run or {"base": "base", "sft": "chat"}[args.stage]


def under_torchrun() -> bool:
    return "LOCAL_WORLD_SIZE" in os.environ


def print_plan(job: TrainerConfig, args: Args) -> dict[str, Any]:
    """Prints the plan; returns it with what memory says of it."""
    found = planned_hardware(args)
    dataset = Store.at(job.storage).child("datasets", job.dataset)
    rows = Manifest.load(dataset).num_sequences("train") if dataset.exists("manifest.json") else 0
    described = plan.describe(
        job.model,
        job.train,
        workers=args.workers,
        hardware=found,
        tokens_per_s=job.about.get("tokens_per_s", 0.0),
        rows=rows,
    )
    print(f"{plan.render(described)}\nstorage   {job.storage}, run {job.run}", flush=True)
    # Workers on CPUs are taken to share this machine.
    free = found.memory or machine.free_memory(torch.device("cpu"), args.workers)
    on_gpu = bool(found.memory)
    try:
        memory.check_memory(job.model, job.train, world=args.workers, on_gpu=on_gpu, free=free)
    except memory.DoesNotFitError as error:
        return {**described, "fits": False, "advice": str(error)}
    return {**described, "fits": True, "advice": ""}


def run_here(job: TrainerConfig, args: Args) -> dict[str, Any]:
    """Trains in this process, or as one rank of ``torchrun``."""
    torch.set_num_threads(args.threads)
    rank = int(os.environ.get("RANK", 0))
    device = torch.device("cpu")
    if args.gpus:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    root = Store.at(job.storage)
    # Of torchrun's ranks the first claims the run for all.
    claim = hold_claim(root, "runs", job.run) if rank == 0 else contextlib.nullcontext()
    with claim as mine, StopOnSignal() as on_signal:
        hooks: list[Hooks] = [_ProcessHooks(on_signal, mine)]
        if rank == 0:
            hooks.append(ProgressPrinter(args.print_every))
        trainer = Trainer(
            job,
            device=device,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
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
def process_group(args: Args) -> Iterator[None]:
    """torchrun's, if this is one of several ranks."""
    import torch.distributed as dist

    if not under_torchrun() or args.plan_only or int(os.environ["WORLD_SIZE"]) == 1:
        yield
        return
    if args.gpus:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl" if args.gpus else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def run_on_ray(job: TrainerConfig, args: Args) -> dict[str, Any]:
    from nanochat_ray.on_ray import session
    from nanochat_ray.on_ray.train import fit

    session.connect()
    session.check_gpus(args.workers if args.gpus else 0)
    return fit(
        job,
        workers=args.workers,
        min_workers=args.min_workers,
        gpus=args.gpus,
        threads=args.threads,
        print_every=args.print_every,
    )


def main(args: Args) -> int:
    with process_group(args):
        return train(args)


def train(args: Args) -> int:
    if under_torchrun():
        args = dataclasses.replace(args, workers=int(os.environ["WORLD_SIZE"]))
    elif not args.ray and not args.plan_only:
        args = dataclasses.replace(args, workers=1)
    job = build(args)
    first = int(os.environ.get("RANK", 0)) == 0
    if args.plan_only:
        described = print_plan(job, args)
        if described["advice"]:
            print(f"memory    does not fit: {described['advice']}")
        print(json.dumps(described))
        return 0
    job = check(job)
    # A group that torchrun starts again goes on with the run that it began itself.
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        check_resume(job.storage, job.run, args.resume)
    if first:
        print_plan(job, args)
    here = under_torchrun() or not args.ray
    result = run_here(job, args) if here else run_on_ray(job, args)
    if first:
        print(f"trained in {duration(result.get('train_seconds', 0.0))}")
        print(json.dumps({"run": job.run, **result}))
    return 0 if result["done"] else STOPPED
