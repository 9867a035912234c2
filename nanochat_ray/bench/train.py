"""Measure training: the step against nanochat's, two workers against one, Ray's share, the feed.

    nanochat-ray bench train --only step --nanochat ../nanochat
    nanochat-ray bench train --only workers,ray,feed

Every figure is the median of interleaved repeats in processes of their own, one thread each. The
last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanochat_ray.bench import train_step
from nanochat_ray.bench.environment import own_process
from nanochat_ray.checks import check_int
from nanochat_ray.data.shards import Manifest, SequenceReader, write_shard
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer, folder_of
from nanochat_ray.train import recipe
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from nanochat_ray.train.data_loader import ShardDataLoader

SIZES = ("steps", "depth", "width", "vocab", "length", "batch")
WARMUP_STEPS = 3
"""First steps of a run that no rate counts."""


@dataclass(frozen=True, kw_only=True)
class Args:
    only: str = "step,workers,ray,feed"
    """Parts to measure, separated by commas."""
    nanochat: Path | None = None
    """Checkout of nanochat; without it the step is not compared."""
    repeats: int = 3
    steps: int = 20
    depth: int = 4
    width: int = 256
    vocab: int = 2048
    length: int = 256
    batch: int = 2048
    """Tokens of a batch."""
    child: str = ""
    """Internal: what a process of its own is to measure, as JSON."""

    def __post_init__(self) -> None:
        for name in ("repeats", *SIZES):
            check_int(name, getattr(self, name), 1)
        check_int("steps", self.steps, WARMUP_STEPS + 1)


def shape(args: Args) -> ModelConfig:
    heads = max(1, args.width // 64)
    return ModelConfig.modern(
        vocab_size=args.vocab,
        n_layer=args.depth,
        n_head=heads,
        n_kv_head=heads,
        n_embd=args.width,
        sequence_len=args.length,
    )


def apart(args: Args, system: str, precision: str) -> dict[str, Any]:
    """What ``train_step`` measures of a system, in a process of its own."""
    sizes = {name: getattr(args, name) for name in SIZES}
    child = {"system": system, "precision": precision, "nanochat": str(args.nanochat)}
    return json.loads(own_process("train", {**child, "sizes": sizes}))


def part_step(args: Args) -> dict[str, float]:
    systems = ["ours"] + (["nanochat"] if args.nanochat else [])
    rates_by: dict[tuple[str, str], list[float]] = {}
    probes: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        for precision in ("fp32", "bf16"):
            for system in systems:
                result = apart(args, system, precision)
                rates_by.setdefault((system, precision), []).append(result["tokens_per_s"])
                if precision == "fp32":
                    probes[system] = result["probe"]
    for (system, precision), rates in rates_by.items():
        each = ", ".join(f"{rate:,.0f}" for rate in rates)
        print(f"step  {system:<9} {precision}  {statistics.median(rates):8,.0f} tokens/s  ({each})")
    if not args.nanochat:
        return {}
    off = max(abs(a - b) for a, b in zip(probes["ours"], probes["nanochat"], strict=True))
    print(f"step  largest difference of logits (fp32, same weights): {off:.1e}")
    if off > 1e-3:
        raise RuntimeError("the two models do not compute the same: no comparison")
    best = {s: max(statistics.median(rates_by[s, p]) for p in ("fp32", "bf16")) for s in systems}
    return {"step_vs_nanochat": best["ours"] / best["nanochat"]}


def dataset(args: Args, folder: Path, rows: int = 4096) -> TrainerConfig:
    """Random rows as a real dataset on disk, and a job that trains on them."""
    root, tokenizer = Store.at(str(folder)), Tokenizer.bytes_only()
    rng = np.random.default_rng(0)
    store = root.child("datasets", "bench")
    splits = {}
    for split, count in (("train", rows), ("val", 8)):
        ids = rng.integers(0, 256, (count, args.length + 1)).astype(np.uint16)
        splits[split] = [write_shard(store, f"{split}-0.arrow", ids, None)]
    manifest = Manifest(
        kind="base",
        tokenizer=tokenizer.fingerprint,
        sequence_len=args.length,
        dtype="uint16",
        splits=splits,
        key="bench",
    )
    tokenizer.save(folder_of(root, tokenizer.fingerprint))
    store.write_text("manifest.json", manifest.to_json())
    model = dataclasses.replace(shape(args), vocab_size=tokenizer.vocab_size)
    batch = 2 * args.batch // args.length
    train = TrainConfig(
        steps=args.steps,
        global_batch_size=batch,
        micro_batch_size=batch // 2,
        precision="bf16",
        eval_sequences=2,
        optim=recipe.optim_config(model, 2 * args.batch, 10**7),
    )
    return TrainerConfig(storage=root.uri, dataset="bench", run="bench", model=model, train=train)


def steady(storage: str, run: str) -> tuple[float, float, float]:
    """Median tokens/s of a run's later steps, its share of waiting for data, all steps' seconds."""
    text = Store.at(storage).child("runs", run).read_text("metrics.jsonl")
    every = [r for r in map(json.loads, text.splitlines()) if r["kind"] == "train"]
    steps = every[WARMUP_STEPS:]
    wait = sum(r["data_wait"] for r in steps) / sum(r["seconds"] for r in steps)
    rate = statistics.median(r["tokens_per_s"] for r in steps)
    return rate, wait, sum(r["seconds"] for r in every)


def alone(job: TrainerConfig) -> None:
    """The job in a process of its own, without a process group."""
    own_process("train", {"job": job.to_json()})


def torchrun(job: TrainerConfig, workers: int) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}")
    own_process("train", {"job": job.to_json()}, launcher)


def part_workers(args: Args) -> dict[str, float]:
    """Two processes with a batch shared between them against one with half the batch."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        whole = dataset(args, Path(folder))
        half = dataclasses.replace(whole.train, global_batch_size=whole.train.micro_batch_size)
        for repeat in range(args.repeats):
            for workers, train in ((1, half), (2, whole.train)):
                run = f"workers-{workers}-{repeat}"
                torchrun(dataclasses.replace(whole, train=train, run=run), workers)
                rates[workers].append(steady(whole.storage, run)[0])
    one, two = (statistics.median(rates[n]) for n in (1, 2))
    print(f"workers  one {one:,.0f} tokens/s, two {two:,.0f} tokens/s")
    return {"two_workers": two / one}


def part_ray(args: Args) -> dict[str, float]:
    """The steady step of one train function, four ways: alone, torchrun, Ray Train, with Ray Data.

    One worker each, so that Ray's own processes find a core, as they do where GPUs compute.
    """
    from nanochat_ray.on_ray import session
    from nanochat_ray.on_ray.train import fit

    session.connect()

    def by_ray(job: TrainerConfig, ray_data: bool) -> None:
        fit(job, workers=1, print_every=10**6, ray_data=ray_data)

    ways: dict[str, Callable[[TrainerConfig], None]] = {
        "plain process": alone,
        "torchrun": lambda job: torchrun(job, 1),
        "Ray Train": lambda job: by_ray(job, False),
        "Ray Train + Ray Data": lambda job: by_ray(job, True),
    }
    rates: dict[str, list[float]] = {way: [] for way in ways}
    waits, rest = [], []
    with tempfile.TemporaryDirectory() as folder:
        whole = dataset(args, Path(folder))
        half = dataclasses.replace(whole.train, global_batch_size=whole.train.micro_batch_size)
        for repeat in range(args.repeats):
            for number, (way, train_by) in enumerate(ways.items()):
                job = dataclasses.replace(whole, train=half, run=f"way-{number}-{repeat}")
                began = time.perf_counter()
                train_by(job)
                seconds = time.perf_counter() - began
                rate, wait, training = steady(job.storage, job.run)
                rates[way].append(rate)
                if way == "Ray Train + Ray Data":
                    waits.append(wait)
                    rest.append(seconds - training)
    median = {way: statistics.median(values) for way, values in rates.items()}
    for way, rate in median.items():
        ratio = median["torchrun"] / rate
        print(f"ray  {way:<20} {rate:8,.0f} tokens/s, step ×{ratio:.3f} of torchrun's")
    print(f"ray  start, checkpoint and shutdown with Ray: {statistics.median(rest):.1f} s")
    return {
        "ray_step_ratio": median["torchrun"] / median["Ray Train + Ray Data"],
        "data_wait_share": statistics.median(waits),
    }


def part_feed(args: Args) -> dict[str, float]:
    """Rows from shards on this disk to batches, with nothing that trains: by Ray Data, and by a
    thread of the training process."""
    from nanochat_ray.on_ray import session
    from nanochat_ray.on_ray.data_loader import RayDataLoader

    session.connect()
    session.quiet_data()
    rates: dict[str, list[float]] = {"plain": [], "Ray Data": []}
    with tempfile.TemporaryDirectory() as folder:
        job = dataset(dataclasses.replace(args, length=1024, batch=2048), Path(folder), rows=32768)
        config = dataclasses.replace(
            job.train, steps=2000, global_batch_size=256, micro_batch_size=256
        )
        store = Store.at(job.storage).child("datasets", "bench")
        manifest = Manifest.load(store)
        reader = SequenceReader(store, manifest, "train")

        feeds = {
            "plain": lambda: ShardDataLoader(reader, config, 0, 1).batches(0),
            "Ray Data": lambda: RayDataLoader(store, manifest, config, 0, 1).batches(0),
        }
        for _ in range(args.repeats):
            for way, feed in feeds.items():
                batches = feed()
                next(batches)  # tasks start, shards are checked
                began, tokens = time.perf_counter(), 0
                for batch in batches:
                    tokens += batch.ids.size
                rates[way].append(tokens / (time.perf_counter() - began))
    for way, values in rates.items():
        print(f"feed  {way:<9} {statistics.median(values) / 1e6:,.0f} million tokens/s")
    return {"feed_tokens_per_s": statistics.median(rates["Ray Data"])}


def run_child(args: Args) -> None:
    torch.set_num_threads(1)
    what = json.loads(args.child)
    if "job" in what:
        import torch.distributed as dist

        from nanochat_ray.train.trainer import Trainer

        job = TrainerConfig.from_json(what["job"])
        if "RANK" not in os.environ:
            Trainer(job).run()
            return
        dist.init_process_group("gloo")
        Trainer(job).run()
        dist.destroy_process_group()
        return
    args = dataclasses.replace(args, **what["sizes"])
    arguments = (shape(args), args.batch, args.steps, what["precision"])
    if what["system"] == "ours":
        print(json.dumps(train_step.ours(*arguments)))
    else:
        print(json.dumps(train_step.theirs(*arguments, what["nanochat"])))


def main(args: Args) -> None:
    if args.child:
        run_child(args)
        return
    parts = {
        "step": part_step,
        "workers": part_workers,
        "ray": part_ray,
        "feed": part_feed,
    }
    names = [part.strip() for part in args.only.split(",")]
    unknown = [part for part in names if part not in parts]
    if unknown:
        raise ValueError(f"only={args.only!r} is not allowed: some of {', '.join(parts)}")
    figures: dict[str, float] = {}
    for part in names:
        figures |= parts[part](args)
    print(json.dumps(figures))
