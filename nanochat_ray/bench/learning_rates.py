"""Measure which factor on the learning rates is best at which batch size.

    nanochat-ray bench learning-rates --storage DIR --dataset base \
        --batches 2048 16384 --scales 0.5 1 2

For each batch and factor a small model is trained on the same number of tokens; the table shows
the validation bits per byte. ``recipe.lr_scale`` rests on this table (optim/BENCHMARKS.md).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field

import numpy as np
import torch

from nanochat_ray.checks import check_float, check_int, check_name
from nanochat_ray.data.shards import SequenceReader
from nanochat_ray.model.config import Precision
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import DTYPES
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.storage import default_root
from nanochat_ray.train import recipe
from nanochat_ray.train.data_loader import ShardDataLoader, open_dataset
from nanochat_ray.train.step import train_step
from nanochat_ray.train.validation import bits_per_byte


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    dataset: str = "base"
    depth: int = 4
    width: int = 128
    tokens: int = 1_000_000
    """Tokens that every run sees."""
    batches: tuple[int, ...] = (2048, 8192, 32768)
    """Tokens of a batch."""
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """Factors on all learning rates."""
    seeds: int = 1
    preset: str = "modern"
    precision: Precision = "bf16"
    eval_sequences: int = 128

    def __post_init__(self) -> None:
        check_name("dataset", self.dataset)
        for name in ("depth", "width", "tokens", "seeds", "eval_sequences"):
            check_int(name, getattr(self, name), 1)
        for batch in self.batches:
            check_int("batches", batch, 1)
        for scale in self.scales:
            check_float("scales", scale, above=True)


def one_run(args: Args, batch: int, scale: float, seed: int) -> float:
    """Validation bits per byte after the run."""
    dataset, manifest, tokenizer = open_dataset(args.storage, args.dataset)
    model_config = recipe.model_config(
        args.depth,
        tokenizer.vocab_size,
        preset=args.preset,
        sequence_len=manifest.sequence_len,
        n_embd=args.width,
        n_head=max(1, args.width // 64),
        n_kv_head=max(1, args.width // 64),
    )
    plan = recipe.base_plan(model_config, tokens=args.tokens, batch=batch, seed=seed)
    optim = plan.train.optim.with_scaled_lr(scale / recipe.lr_scale(plan.train.steps))
    train = dataclasses.replace(plan.train, optim=optim)
    model = GPT(model_config, compute_dtype=DTYPES[args.precision])
    model.init_weights(torch.Generator().manual_seed(seed))
    optimizer = ShardedOptimizer(model, train.optim, model.compute_dtype)
    reader = SequenceReader(dataset, manifest, "train")
    for step, sequences in enumerate(ShardDataLoader(reader, train, 0, 1).batches(0)):
        train_step(model, optimizer, sequences, step, train)
    reader = SequenceReader(dataset, manifest, "val")
    ids, _ = reader.read(np.arange(min(args.eval_sequences, len(reader)), dtype=np.int64))
    model.eval()
    return bits_per_byte(
        model, ids, tokenizer.byte_lengths(), micro_batch_size=train.micro_batch_size
    )


def main(args: Args) -> None:
    torch.set_num_threads(1)
    table: dict[str, dict[str, float]] = {}
    print("batch      " + "".join(f"  ×{scale:<7g}" for scale in args.scales), flush=True)
    for batch in args.batches:
        row = {}
        for scale in args.scales:
            losses = [one_run(args, batch, scale, seed) for seed in range(args.seeds)]
            row[f"{scale:g}"] = float(np.mean(losses))
        table[str(batch)] = row
        print(f"{batch:<10d} " + "".join(f"  {v:<8.4f}" for v in row.values()), flush=True)
    print(json.dumps({"bits_per_byte": table, "args": dataclasses.asdict(args)}))
