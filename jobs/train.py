"""Train a base model, or fine-tune one to chat.

python jobs/train.py --storage DIR --dataset base --run base --depth 4
python jobs/train.py --storage DIR --stage sft --dataset sft --run chat --parent base
python jobs/train.py --depth 20 --hardware h100 --workers 8 --plan-only   # what would it take?
ray job submit -- python jobs/train.py ...          # on a cluster: Ray Train and Ray Data
torchrun --nproc-per-node 2 -- jobs/train.py ...      # the same loop without Ray
python jobs/train.py --no-ray ...                   # and in this process

The last line is one JSON object. Exit status: 0 the run is at its end (or the plan is printed);
75 it was asked to stop (SIGTERM or Ctrl-C) and left a checkpoint, so run the same command again;
2 what was asked for is not possible; 1 anything else, such as a gradient that stays not finite.
torchrun passes SIGTERM on and waits 30 s, and its own status is 1 whatever its workers say.
"""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from nanochat_ray import machine, scaling
from nanochat_ray.checkpoint import snapshot
from nanochat_ray.checks import check_float, check_int, check_name, require
from nanochat_ray.cli import entry
from nanochat_ray.config import ModelConfig, Precision, TrainConfig, to_json, with_options
from nanochat_ray.storage import Store, absolute, default_root
from nanochat_ray.train import hardware, memory, plan
from nanochat_ray.train.job import Resume, TrainJob, check, check_resume, execute, open_dataset
from nanochat_ray.train.metrics import duration, progress_line, wanted
from nanochat_ray.train.stop import STOPPED, StopOnSignal

BASE_FLAGS = ("depth", "preset", "ratio", "tokens", "cpu_minutes")
"""Fine-tuning takes the model from its parent and the tokens from its dataset."""
SFT_FLAGS = ("parent", "epochs")
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
    """Run that sft starts from; by default "base"."""
    depth: int | None = None
    """Layers, by default 4; all else follows from it (base)."""
    preset: str | None = None
    """modern (the default) or classic (base)."""
    ratio: float | None = None
    """Tokens to train on for each parameter of blocks and head, by default 12 (base)."""
    tokens: int | None = None
    """Tokens to train on; by default they follow the ratio (base)."""
    cpu_minutes: float | None = None
    """On a CPU: no more tokens than about so many minutes take; by default no bound (base)."""
    batch_tokens: int = 0
    """Tokens of a global batch; 0 follows the scaling rule."""
    epochs: float | None = None
    """Passes over the data, by default 1 (sft)."""
    micro_rows: int = 0
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
    precision: Precision = "bf16"
    seed: int = 0
    options: list[str] = field(default_factory=list)
    """Any field of ModelConfig, TrainConfig and OptimConfig (nanochat_ray/config.py) as name=value,
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
    keep: int = 2
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
        if self.preset is not None:
            allowed = f"one of {', '.join(PRESETS)}"
            require(self.preset in PRESETS, "preset", self.preset, allowed)
        for name, least in (
            *(("depth", 1), ("tokens", 0), ("batch_tokens", 0), ("micro_rows", 0), ("workers", 1)),
            *(("min_workers", 0), ("threads", 1), ("seed", 0), ("save_every", 0), ("keep", 1)),
            *(("print_every", 1), ("sample_tokens", 0)),
        ):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), least, MAX_INT)
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
        return scaling.model_config(depth, PLANNED_VOCABULARY, preset=preset)
    _, manifest, tokenizer = open_dataset(args.storage, dataset)
    return scaling.model_config(
        depth,
        tokenizer.vocab_size,
        preset=preset,
        sequence_len=manifest.sequence_len,
    )


def base_train(args: Args, model: ModelConfig) -> TrainConfig:
    tokens, ratio = args.tokens or 0, args.ratio or scaling.TOKENS_PER_PARAMETER
    if args.cpu_minutes and not args.gpus and not tokens:
        bound = scaling.tokens_in_minutes(model, args.cpu_minutes, args.workers)
        tokens = min(bound, scaling.horizon(model, ratio))
    train = scaling.base_plan(
        model,
        tokens=tokens,
        ratio=ratio,
        batch=args.batch_tokens,
        micro_rows=args.micro_rows,
        workers=args.workers,
        precision=args.precision,
        seed=args.seed,
    ).train
    if args.micro_rows:
        return train
    return plan.fitted(model, train, workers=args.workers, hardware=planned_hardware(args))


def sft_train(args: Args, parent: ModelConfig, dataset: str) -> TrainConfig:
    _, manifest, _ = open_dataset(args.storage, dataset)
    return scaling.sft_config(
        parent,
        manifest.rows("train"),
        epochs=args.epochs or 1.0,
        batch=args.batch_tokens,
        micro_rows=args.micro_rows,
        workers=args.workers,
        precision=args.precision,
        seed=args.seed,
    )


def build(args: Args) -> TrainJob:
    """The job that the flags describe. Raises ValueError."""
    dataset = args.dataset or args.stage
    parent = args.parent or "base"
    if args.stage == "sft":
        store = Store.at(args.storage).child("runs", parent)
        if snapshot.latest(store) is None:
            raise ValueError(f"parent={parent!r} has no checkpoint in {args.storage}")
        model = snapshot.load_config(store).model
        train = sft_train(args, model, dataset)
    else:
        model = base_model(args, dataset)
        train = base_train(args, model)
    train = dataclasses.replace(
        train,
        optim=scaling.scaled(train.optim, args.lr_scale),
        save_every=args.save_every or train.save_every,
        keep=args.keep,
        checkpoint_activations=args.checkpoint_activations,
        deterministic=args.deterministic,
        spike_clip=args.spike_clip,
        sample_tokens=args.sample_tokens,
    )
    shaped, options = with_options(model, args.options)
    if args.stage == "sft":
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
    return TrainJob(
        storage=args.storage,
        dataset=dataset,
        run=args.run or {"base": "base", "sft": "chat"}[args.stage],
        model=model,
        train=train,
        parent=parent if args.stage == "sft" else "",
        tensorboard=args.tensorboard,
        wandb=args.wandb,
    )


def print_plan(job: TrainJob, args: Args) -> dict[str, Any]:
    """Prints the plan; returns it with what memory says of it."""
    found = planned_hardware(args)
    described = plan.describe(job.model, job.train, workers=args.workers, hardware=found)
    print(f"{plan.render(described)}\nstorage   {job.storage}, run {job.run}", flush=True)
    # Workers on CPUs are taken to share this machine.
    free = found.memory or machine.free_memory(torch.device("cpu"), args.workers)
    on_gpu = bool(found.memory)
    try:
        memory.refuse(job.model, job.train, world=args.workers, on_gpu=on_gpu, free=free)
    except memory.DoesNotFitError as error:
        return {**described, "fits": False, "advice": str(error)}
    return {**described, "fits": True, "advice": ""}


def run_here(job: TrainJob, args: Args) -> dict[str, Any]:
    """Trains in this process, or as one rank of ``torchrun``."""
    import torch.distributed as dist

    torch.set_num_threads(args.threads)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if args.gpus:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if args.gpus else "gloo")

    def report(record: dict[str, Any]) -> None:
        if rank == 0 and wanted(record, args.print_every):
            print(progress_line(record), flush=True)

    try:
        with StopOnSignal() as stop:
            return execute(
                job,
                rank=rank,
                world=world,
                sharing=int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
                device=device,
                report=report,
                should_stop=stop.asked.is_set,
            )
    finally:
        if world > 1:
            dist.destroy_process_group()


def run_on_ray(job: TrainJob, args: Args) -> dict[str, Any]:
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
    under_torchrun = "LOCAL_WORLD_SIZE" in os.environ
    if under_torchrun:
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
    check(job)
    # A group that torchrun starts again goes on with the run that it began itself.
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        check_resume(job.storage, job.run, args.resume)
    if first:
        print_plan(job, args)
    here = under_torchrun or not args.ray
    result = run_here(job, args) if here else run_on_ray(job, args)
    if first:
        print(f"trained in {duration(result.get('train_seconds', 0.0))}")
        print(json.dumps({"run": job.run, **result}))
    return 0 if result["done"] else STOPPED


if __name__ == "__main__":
    entry.run(main, Args, __doc__)
