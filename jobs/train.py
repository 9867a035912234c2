"""Train a base model, or fine-tune one to chat.

python jobs/train.py --storage DIR --dataset base --run base --depth 4
python jobs/train.py --storage DIR --stage sft --dataset sft --run chat --parent base
ray job submit -- python jobs/train.py ...          # on a cluster: Ray Train and Ray Data
torchrun --nproc-per-node 2 -- jobs/train.py ...      # the same loop without Ray
python jobs/train.py --no-ray ...                   # and in this process
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import tyro

from nanochat_ray import scaling
from nanochat_ray.checkpoint import snapshot
from nanochat_ray.config import OptimConfig, Precision, TrainConfig
from nanochat_ray.storage import Store, default_root
from nanochat_ray.train.job import TrainJob, check, execute, open_dataset
from nanochat_ray.train.metrics import duration, progress_line


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds datasets, tokenizers and runs."""
    stage: Literal["base", "sft"] = "base"
    dataset: str = ""
    """Name of a prepared dataset; by default that of the stage."""
    run: str = ""
    """Name of the run; by default "base" or "chat". A run that exists is resumed."""
    parent: str = "base"
    """Run that sft starts from."""
    depth: int = 4
    """Layers; all else follows from it."""
    preset: str = "modern"
    ratio: float = scaling.TOKENS_PER_PARAMETER
    """Tokens to train on for each parameter of blocks and head."""
    tokens: int = 0
    """Tokens to train on; 0 follows the ratio."""
    cpu_minutes: float = 0.0
    """On a CPU: no more tokens than about so many minutes take; 0 is no bound."""
    batch_tokens: int = 0
    """Tokens of a global batch; 0 follows the scaling rule."""
    epochs: float = 1.0
    """Passes over the data (sft)."""
    micro_rows: int = 0
    """Rows of one forward pass of one worker; 0 chooses."""
    lr_scale: float = 1.0
    """Factor on every learning rate."""
    workers: int = 2
    gpus: bool = False
    """One GPU for each worker."""
    threads: int = 1
    """Torch threads of a worker on the CPU."""
    precision: Precision = "bf16"
    seed: int = 0
    save_every: int = 0
    """Steps between checkpoints; 0 saves a quarter of the run apart."""
    print_every: int = 10
    ray: bool = True
    """Train with Ray Train; --no-ray stays in this process (torchrun implies it)."""
    plan_only: bool = False
    """Print what would be trained, and stop."""


def sft_train(args: Args, parent: snapshot.RunConfigFile, rows: int) -> TrainConfig:
    """The fine-tuning schedule: rates of the base run, lower, and straight down to zero."""
    length = parent.model.sequence_len
    size = args.batch_tokens or min(2**14, scaling.batch_tokens(rows * length))
    batch = max(args.workers, size // length)
    batch = -(-batch // args.workers) * args.workers
    base = scaling.optim_config(parent.model, batch * length, rows * length)
    scale = 0.5 * args.lr_scale
    optim = dataclasses.replace(
        scaled(base, scale), weight_decay=0.0, warmup=0.02, warmdown=0.9, final_lr=0.0
    )
    steps = max(1, round(args.epochs * rows / batch))
    return TrainConfig(
        stage="sft",
        steps=steps,
        batch_rows=batch,
        micro_rows=args.micro_rows or _micro(batch // args.workers, length),
        seed=args.seed,
        precision=args.precision,
        optim=optim,
        eval_every=-(-steps // 3),
        save_every=args.save_every or -(-steps // 2),
    )


def _micro(rows: int, length: int) -> int:
    wanted = max(1, 2**14 // length)
    return next(n for n in range(min(rows, wanted), 0, -1) if rows % n == 0)


def scaled(optim: OptimConfig, factor: float) -> OptimConfig:
    rates = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")
    return dataclasses.replace(optim, **{name: getattr(optim, name) * factor for name in rates})


def build(args: Args) -> TrainJob:
    """The job that the flags describe. Raises ValueError."""
    name = args.dataset or args.stage
    _, manifest, tokenizer = open_dataset(args.storage, name)
    run = args.run or {"base": "base", "sft": "chat"}[args.stage]
    if args.stage == "sft":
        store = Store.at(args.storage).child("runs", args.parent)
        latest = snapshot.latest(store)
        if latest is None:
            raise ValueError(f"parent={args.parent!r} has no checkpoint in {args.storage}")
        parent = snapshot.load_config(store, latest)
        train = sft_train(args, parent, manifest.rows("train"))
        model = parent.model
    else:
        model = scaling.model_config(
            args.depth,
            tokenizer.vocab_size,
            preset=args.preset,
            sequence_len=manifest.sequence_len,
        )
        tokens = args.tokens
        if args.cpu_minutes and not args.gpus and not tokens:
            bound = scaling.tokens_in_minutes(model, args.cpu_minutes, args.workers)
            tokens = min(bound, scaling.horizon(model, args.ratio))
        plan = scaling.base_plan(
            model,
            tokens=tokens,
            ratio=args.ratio,
            batch=args.batch_tokens,
            micro_rows=args.micro_rows,
            workers=args.workers,
            precision=args.precision,
            seed=args.seed,
        )
        train = dataclasses.replace(plan.train, optim=scaled(plan.train.optim, args.lr_scale))
        if args.save_every:
            train = dataclasses.replace(train, save_every=args.save_every)
    return TrainJob(
        storage=args.storage,
        dataset=name,
        run=run,
        model=model,
        train=train,
        parent=args.parent if args.stage == "sft" else "",
    )


def print_plan(job: TrainJob) -> None:
    counts, train = scaling.parameters(job.model), job.train
    tokens = train.steps * train.batch_rows * job.model.sequence_len
    flops = scaling.flops_per_token(job.model) * tokens
    print(
        f"model: {job.model.n_layer} layers, {job.model.n_embd} wide, {job.model.n_head} heads, "
        f"vocabulary {job.model.vocab_size:,}, context {job.model.sequence_len:,}: "
        f"{counts.total / 1e6:.1f} M parameters ({counts.matrices / 1e6:.1f} M in the blocks)\n"
        f"train: {train.steps:,} steps of {train.batch_rows} rows "
        f"({train.batch_rows * job.model.sequence_len:,} tokens), {tokens / 1e6:.1f} M tokens, "
        f"{flops:.2e} FLOPs, {train.precision}; into {job.storage}, run {job.run}",
        flush=True,
    )


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
        last = record["step"] == job.train.steps
        if rank == 0 and (
            record["kind"] == "eval" or last or record["step"] % args.print_every == 0
        ):
            print(progress_line(record), flush=True)

    try:
        return execute(job, rank=rank, world=world, device=device, report=report)
    finally:
        if world > 1:
            dist.destroy_process_group()


def main(args: Args) -> None:
    under_torchrun = "LOCAL_WORLD_SIZE" in os.environ
    if under_torchrun:
        args = dataclasses.replace(args, workers=int(os.environ["WORLD_SIZE"]))
    elif not args.ray:
        args = dataclasses.replace(args, workers=1)
    job = build(args)
    check(job)
    first = int(os.environ.get("RANK", 0)) == 0
    if first:
        print_plan(job)
    if args.plan_only:
        return
    if args.ray and not under_torchrun:
        from nanochat_ray.on_ray import session
        from nanochat_ray.on_ray.train import fit

        session.connect()
        result = fit(
            job,
            workers=args.workers,
            gpus=args.gpus,
            threads=args.threads,
            print_every=args.print_every,
        )
    else:
        result = run_here(job, args)
    if first:
        print(f"trained in {duration(result.get('train_seconds', 0.0))}")
        print(json.dumps({"run": job.run, **result}))


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
