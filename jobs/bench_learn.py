"""Measure learning: tokens and seconds to the bits per byte that AdamW reaches, for each optimizer.

    python jobs/bench_learn.py --datasets base bible --nanochat ../nanochat

One model, one order of rows, four optimizers: torch's AdamW with one rate for all parameters;
AdamW with our rates for embeddings, head and scalars and five to choose from for the matrices;
nanochat's with its own schedules (from a checkout); and ours. Each AdamW gets ``--steps`` steps
with each of five rates and, at the best, three seeds; what it reaches on held-out text is a target.
The others get five rates each at a shorter horizon, then three seeds at several horizons, each run
annealed to its end; the horizon that just reaches a target is interpolated. Seconds are those of
the processor, which other load does not change much. The last line is one JSON object.

    python jobs/bench_learn.py --what ablation     what each option of model and optimizer gives
    python jobs/bench_learn.py --what extension    trained at T, held-out text of 4T, by YaRN
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro

from nanochat_ray import scaling
from nanochat_ray.config import ModelConfig, TrainConfig
from nanochat_ray.data.shards import RowReader
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.groups import build_groups
from nanochat_ray.optim.schedule import lr_factor
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.storage import default_root
from nanochat_ray.train.feed import from_shards
from nanochat_ray.train.job import DTYPES, open_dataset
from nanochat_ray.train.step import Batch, split, train_step
from nanochat_ray.train.validation import bits_per_byte

FACTORS = {
    "adamw": (0.001, 0.002, 0.004, 0.008, 0.016),
    "adamw by kind": (0.001, 0.002, 0.004, 0.008, 0.016),
    "nanochat": (0.25, 0.5, 1.0, 2.0, 4.0),
    "ours": (0.5, 0.7, 1.0, 1.4, 2.0),
}
"""AdamW: the rate. nanochat: a factor on its rates, which were tuned at depth 12. Ours: a factor on
what ``scaling.optim_config`` gives."""
TARGETS = ("adamw", "adamw by kind")


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    datasets: tuple[str, ...] = ("base",)
    nanochat: Path | None = None
    """Checkout of nanochat; without it only AdamW and ours are compared."""
    depth: int = 4
    width: int = 128
    batch_rows: int = 4
    steps: int = 400
    """AdamW's horizon; that of each run of the ablation."""
    what: Literal["learn", "ablation", "extension"] = "learn"
    only: tuple[str, ...] = ()
    """Options of the ablation; by default all."""
    tuned_at: float = 0.5
    """Share of it at which the others' rates are tuned."""
    horizons: tuple[float, ...] = (0.15, 0.3, 0.5, 0.7, 0.9)
    """Shares of it at which they are then run, as far as is needed to reach the targets."""
    seeds: int = 3
    jobs: int = 2
    """Runs at a time, one thread each."""
    eval_rows: int = 96
    child: str = ""
    """Internal: one run, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run; ``model``, ``optim`` and ``train`` override fields of the configurations."""

    storage: str
    dataset: str
    side: str
    rate: float
    seed: int
    steps: int
    depth: int
    width: int
    batch_rows: int
    eval_rows: int
    nanochat: str = ""
    row_tokens: int = 0
    """Train on the first tokens of each row only; 0 takes all."""
    model: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


def shape(trial: Trial, vocab_size: int, length: int) -> ModelConfig:
    heads = max(1, trial.width // 64)
    fields = {
        "vocab_size": vocab_size,
        "n_layer": trial.depth,
        "n_head": heads,
        "n_kv_head": heads,
        "n_embd": trial.width,
        "sequence_len": length,
    }
    return ModelConfig.modern(**{**fields, **trial.model})


def build(trial: Trial, vocab_size: int, length: int) -> tuple[GPT, TrainConfig]:
    """The trial's model with fresh weights, and how it is trained."""
    config = shape(trial, vocab_size, length)
    model = GPT(config, DTYPES["bf16"])
    model.init_weights(torch.Generator().manual_seed(trial.seed))
    batch = trial.batch_rows * length
    optim = scaling.optim_config(config, batch, trial.steps * batch)
    rates = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")
    optim = dataclasses.replace(optim, **{n: getattr(optim, n) * trial.rate for n in rates})
    train = TrainConfig(
        steps=trial.steps,
        batch_rows=trial.batch_rows,
        micro_rows=trial.batch_rows,
        seed=trial.seed,
        precision="bf16",
        optim=dataclasses.replace(optim, **trial.optim),
        **trial.train,
    )
    return model, train


def run_trial(trial: Trial) -> dict[str, float]:
    """Trains and returns ``bits_per_byte`` and the processor's ``seconds`` of the steps.

    With ``row_tokens`` the model is then shown whole rows, and ``beyond_plain`` and
    ``beyond_yarn`` are the figures of the tokens that lie past what it was trained on.
    """
    torch.set_num_threads(1)
    store, manifest, tokenizer = open_dataset(trial.storage, trial.dataset)
    length = trial.row_tokens or manifest.sequence_len
    model, train = build(trial, tokenizer.vocab_size, length)
    config = model.config
    reader = RowReader(store, manifest, "train")
    sides = {"adamw": adamw, "adamw by kind": by_kind, "nanochat": nanochat, "ours": ours}
    step = sides[trial.side](model, train, trial)
    began = time.process_time()
    for k, rows in enumerate(from_shards(reader, train, 0, 1)(0)):
        step(k, Batch(rows.ids[:, : length + 1]))
    seconds = time.process_time() - began
    held_out = RowReader(store, manifest, "val")
    ids, _ = held_out.rows(np.arange(min(trial.eval_rows, len(held_out))))
    model.eval()
    lengths = tokenizer.byte_lengths()
    found = bits_per_byte(model, ids[:, : length + 1], lengths, micro_rows=8)
    result = {"bits_per_byte": found, "seconds": seconds}
    if trial.row_tokens:
        stretched = dataclasses.replace(config, rope_factor=manifest.sequence_len / length)
        longer = GPT(stretched, model.compute_dtype)
        longer.load_state_dict(model.state_dict())
        result["beyond_plain"] = beyond(model, ids, lengths, length)
        result["beyond_yarn"] = beyond(longer.eval(), ids, lengths, length)
    return result


@torch.no_grad()
def beyond(model: GPT, ids: np.ndarray, byte_lengths: np.ndarray, trained: int) -> float:
    """Bits per byte of the targets from position ``trained`` on, given all before them."""
    rows = torch.from_numpy(ids.astype(np.int64))
    sizes = torch.from_numpy(byte_lengths.astype(np.int64))[rows[:, 1:]]
    sizes[:, :trained] = 0
    targets = rows[:, 1:].masked_fill(sizes == 0, -1)
    nats = sum(
        float(model.loss(rows[at : at + 8, :-1], targets[at : at + 8], "sum"))
        for at in range(0, len(rows), 8)
    )
    return nats / (math.log(2) * int(sizes.sum()))


Step = Callable[[int, Any], None]


def ours(model: GPT, train: TrainConfig, trial: Trial) -> Step:
    optimizer = ShardedOptimizer(model, train.optim, model.compute_dtype)
    return lambda k, rows: void(train_step(model, optimizer, rows, k, train))


def void(_: object) -> None:
    """Takes a result that nobody wants."""


def loss_of(model: GPT, rows: Any) -> torch.Tensor:
    ((inputs, targets),) = split(rows, len(rows.ids), torch.device("cpu"))
    return model.loss(inputs, targets)


def adamw(model: GPT, train: TrainConfig, trial: Trial) -> Step:
    """betas 0.9 and 0.95, decay 0.1 of matrices, 2% warm-up, then a cosine to a tenth."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    scalars = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": scalars, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=trial.rate, betas=(0.9, 0.95))
    warmup = max(1, train.steps // 50)

    def factor(k: int) -> float:
        share = max(0.0, k - warmup) / max(1, train.steps - warmup)
        return min(1.0, (k + 1) / warmup) * (0.55 + 0.45 * math.cos(math.pi * share))

    return scheduled(model, optimizer, factor)


def by_kind(model: GPT, train: TrainConfig, trial: Trial) -> Step:
    """Ours in all but the matrices, which get AdamW at the trial's rate."""
    # The trial's rate is the matrices': the others' are as our rules give them.
    optim = scaling.optim_config(
        model.config,
        train.batch_rows * model.config.sequence_len,
        train.steps * train.batch_rows * model.config.sequence_len,
    )
    named = dict(model.named_parameters())
    groups = []
    for group in build_groups(named.items(), optim):
        muon = group.kind == "muon"
        groups.append(
            {
                "params": [named[name] for name in group.names],
                "lr": trial.rate if muon else group.lr,
                "betas": (0.9, 0.95) if muon else (group.beta1, group.beta2),
                "eps": group.eps,
                "weight_decay": 0.1 if muon else group.weight_decay,
            }
        )
    optimizer = torch.optim.AdamW(groups)
    return scheduled(model, optimizer, lambda k: lr_factor(k, train.steps, optim))


def scheduled(model: GPT, optimizer: torch.optim.Optimizer, factor: Callable[[int], float]) -> Step:
    """Steps with gradients clipped to a norm of 1 and all rates times ``factor(step)``."""
    full = [group["lr"] for group in optimizer.param_groups]

    def step(k: int, rows: Any) -> None:
        for group, rate in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = rate * factor(k)
        loss_of(model, rows).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def nanochat(model: GPT, train: TrainConfig, trial: Trial) -> Step:
    """nanochat's optimizer on our model (its names are ours), with its schedules of July 2026.

    Its 40 steps of warm-up are cut to a tenth of a run that is shorter than 400.
    """
    os.environ["NANOCHAT_DTYPE"] = "bfloat16"
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling took longer than it gave
    sys.path.insert(0, trial.nanochat)
    import types

    for name in ("wandb", "kernels", "filelock"):
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
    from nanochat import gpt as peer

    model.get_device = lambda: torch.device("cpu")  # type: ignore[assignment]
    # scripts/base_train.py: decay falls with the batch's root and the horizon.
    batch = train.batch_rows * model.config.sequence_len
    reference_tokens = scaling.REFERENCE_TOKENS
    decay = 0.28 * math.sqrt(batch / scaling.REFERENCE_BATCH)
    decay *= reference_tokens / (train.steps * batch)
    rate = trial.rate
    optimizer = peer.GPT.setup_optimizer(
        model,
        unembedding_lr=0.008 * rate,
        embedding_lr=0.3 * rate,
        scalar_lr=0.5 * rate,
        matrix_lr=0.02 * rate,
        weight_decay=min(decay, 0.28),
    )
    warmdown, warmup = round(0.65 * train.steps), max(1, min(40, train.steps // 10))

    def step(k: int, rows: Any) -> None:
        left = (train.steps - k) / warmdown
        factor = min((k + 1) / warmup, 1.0, left + (1 - left) * 0.05)
        momentum = 0.85 + 0.12 * min(1.0, k / 400)
        if k >= 400 and left <= 1:
            momentum = 0.97 * left + 0.90 * (1 - left)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = (
                    min(decay, 0.28) * 0.5 * (1 + math.cos(math.pi * k / train.steps))
                )
        loss_of(model, rows).backward()
        optimizer.step()
        model.zero_grad(set_to_none=True)

    return step


class Bench:
    """Runs trials in processes of their own, ``jobs`` at a time, and remembers what they gave."""

    def __init__(self, args: Args):
        self.args = args
        self.pool = ThreadPoolExecutor(args.jobs)

    def trial(self, dataset: str, side: str, rate: float, seed: int, share: float) -> Trial:
        a = self.args
        return Trial(
            storage=a.storage,
            dataset=dataset,
            side=side,
            rate=rate,
            seed=seed,
            steps=max(1, round(a.steps * share)),
            depth=a.depth,
            width=a.width,
            batch_rows=a.batch_rows,
            eval_rows=a.eval_rows,
            nanochat=str(a.nanochat or ""),
        )

    def run(self, trials: list[Trial]) -> list[dict[str, float]]:
        return list(self.pool.map(apart, trials))


def apart(trial: Trial) -> dict[str, float]:
    """The trial in a process of its own; prints a line."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(dataclasses.asdict(trial))],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{trial} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    changed = {**trial.model, **trial.optim}
    print(
        f"  {trial.dataset} {trial.side:<8} rate {trial.rate:<6g} seed {trial.seed} "
        f"{trial.steps:>5} steps  {found['bits_per_byte']:.4f} bits per byte  "
        f"{found['seconds']:.0f} s  {changed or ''}",
        flush=True,
    )
    return found


def reached(target: float, points: list[tuple[float, float]]) -> float | None:
    """The horizon at which the curve through ``(horizon, bits per byte)`` meets the target.

    Linear in the logarithm of the horizon, which these curves nearly are. None if it never does.
    """
    points = sorted(points)
    if points[0][1] <= target:
        return points[0][0]  # or fewer
    for (low, above), (high, below) in itertools.pairwise(points):
        if below <= target:
            share = (above - target) / (above - below)
            return float(math.exp(math.log(low) + share * math.log(high / low)))
    return None


def compare(bench: Bench, dataset: str) -> dict[str, Any]:
    """Tokens and seconds to the targets, as shares of what each AdamW took, for each side."""
    args = bench.args
    seeds = range(args.seeds)

    def best(side: str, share: float) -> float:
        tried = [bench.trial(dataset, side, rate, 0, share) for rate in FACTORS[side]]
        found = bench.run(tried)
        return min(zip(found, tried, strict=True), key=lambda x: x[0]["bits_per_byte"])[1].rate

    targets: dict[str, dict[str, float]] = {}
    for side in TARGETS:
        rate = best(side, 1.0)
        runs = bench.run([bench.trial(dataset, side, rate, seed, 1.0) for seed in seeds])
        bits = statistics.mean(r["bits_per_byte"] for r in runs)
        spent = statistics.median(r["seconds"] for r in runs)
        targets[side] = {"rate": rate, "bits_per_byte": bits, "seconds": spent}
        print(f"{dataset}: {side} at {rate:g} reaches {bits:.4f} bits per byte", flush=True)
    lowest = min(target["bits_per_byte"] for target in targets.values())
    result: dict[str, Any] = {"targets": targets}
    for side in ("ours", "nanochat") if args.nanochat else ("ours",):
        rate = best(side, args.tuned_at)
        points, cost = [], []
        for share in args.horizons:
            runs = bench.run([bench.trial(dataset, side, rate, s, share) for s in seeds])
            points.append((share, statistics.mean(r["bits_per_byte"] for r in runs)))
            cost.append(statistics.median(r["seconds"] for r in runs) / share)
            if points[-1][1] <= lowest:
                break
        mine: dict[str, Any] = {"rate": rate, "points": points}
        result[side] = mine
        for name, target in targets.items():
            tokens = reached(target["bits_per_byte"], points)
            seconds = tokens * statistics.median(cost) / target["seconds"] if tokens else None
            mine[name] = {"tokens": tokens, "seconds": seconds}
            shown = f"{tokens:.3f}" if tokens else f"more than {args.horizons[-1]}"
            timed = f"{seconds:.3f}" if seconds else "?"
            print(
                f"{dataset}: {side} at {rate:g} needs {shown} of the tokens and {timed} of the "
                f"seconds of {name}",
                flush=True,
            )
    return result


def learn(args: Args) -> dict[str, float | None]:
    """The two ratios of the bench, each the worst over the datasets.

    AdamW is the one with one rate; nanochat's tokens are counted to the harder target.
    """
    bench = Bench(args)
    found = {dataset: compare(bench, dataset) for dataset in args.datasets}
    print(json.dumps(found))
    plain, harder = TARGETS
    own = [found[d]["ours"][plain]["tokens"] for d in args.datasets]
    result = {"tokens_vs_adamw": max(own) if all(own) else None, "tokens_vs_nanochat": None}
    if args.nanochat:
        mine = [found[d]["ours"][harder]["tokens"] for d in args.datasets]
        peers = [found[d]["nanochat"][harder]["tokens"] or args.horizons[-1] for d in args.datasets]
        if all(mine):
            result["tokens_vs_nanochat"] = max(m / p for m, p in zip(mine, peers, strict=True))
    return result


OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "defaults": {},
    "no value embeddings": {"model": {"value_embeds": False}},
    "no residual scalars": {"model": {"residual_scalars": False}},
    "no smear": {"model": {"smear": False}},
    "backout": {"model": {"backout": True}},
    "no softcap": {"model": {"softcap": 0.0}},
    "U-Net skips": {"model": {"skips": True}},
    "attention gates": {"model": {"attention_gate": True}},
    "residual decay 1.1": {"model": {"residual_decay": 1.1}},
    "windows SSSL": {"model": {"window_pattern": "SSSL"}},
    "window warm-up": {"train": {"window_warmup": 0.5}},
    "document mask": {"model": {"document_start": -2}},
    "windows SSSL, document mask": {"model": {"window_pattern": "SSSL", "document_start": -2}},
    "dropout 0.1": {"model": {"dropout": 0.1}},
    "one key/value head": {"model": {"n_kv_head": 1}},
    "Newton-Schulz": {"optim": {"orthogonalizer": "newton_schulz"}},
    "no NorMuon": {"optim": {"normuon": False}},
    "no equilibration": {"optim": {"equilibrate": False}},
    "cautious decay": {"optim": {"cautious": True}},
    "no decay": {"optim": {"weight_decay": 0.0}},
    "warm-down 0.5": {"optim": {"warmdown": 0.5}},
}


def step_times(trials: list[Trial], repeats: int = 12) -> list[float]:
    """Median seconds of a step of each trial. The trials take turns, step by step, so that what
    else the machine does falls on all alike."""
    torch.set_num_threads(1)
    store, manifest, tokenizer = open_dataset(trials[0].storage, trials[0].dataset)
    reader = RowReader(store, manifest, "train")
    running = []
    for trial in trials:
        model, train = build(trial, tokenizer.vocab_size, manifest.sequence_len)
        running.append((ours(model, train, trial), next(iter(from_shards(reader, train, 0, 1)(0)))))
    seconds: list[list[float]] = [[] for _ in trials]
    for i in range(repeats):
        for trial, (step, rows), spent in zip(trials, running, seconds, strict=True):
            began = time.perf_counter()
            step(i * trial.steps // repeats, Batch(rows.ids))  # the whole of any schedule
            spent.append(time.perf_counter() - began)
    return [statistics.median(spent[1:]) for spent in seconds]


def ablation(args: Args) -> dict[str, Any]:
    """Each option against the defaults, with the same seeds: what it gives, what it costs."""
    bench, dataset = Bench(args), args.datasets[0]
    _, _, tokenizer = open_dataset(args.storage, dataset)
    names = [n for n in OPTIONS if not args.only or n in (*args.only, "defaults")]
    trials = []
    for name in names:
        changes: dict[str, Any] = {p: dict(values) for p, values in OPTIONS[name].items()}
        if changes.get("model", {}).get("document_start") == -2:
            changes["model"]["document_start"] = tokenizer.bos
        for seed in range(args.seeds):
            plain = bench.trial(dataset, "ours", 1.0, seed, 1.0)
            trials.append(dataclasses.replace(plain, **changes))
    runs = bench.run(trials)
    table: dict[str, Any] = {}
    times = step_times(trials[:: args.seeds])
    for i, (name, cost) in enumerate(zip(names, times, strict=True)):
        mine = runs[i * args.seeds : (i + 1) * args.seeds]
        base = runs[: args.seeds]
        differences = [
            a["bits_per_byte"] - b["bits_per_byte"] for a, b in zip(mine, base, strict=True)
        ]
        table[name] = {
            "bits_per_byte": statistics.mean(r["bits_per_byte"] for r in mine),
            "difference": statistics.mean(differences),
            "spread": max(differences) - min(differences),
            "time": cost / times[0],
        }
    print("| option | bits per byte | against the defaults | time |")
    print("|---|---|---|---|")
    for name, row in table.items():
        print(
            f"| {name} | {row['bits_per_byte']:.4f} | {row['difference']:+.4f} "
            f"(spread {row['spread']:.4f}) | ×{row['time']:.2f} |"
        )
    return table


def extension(args: Args) -> dict[str, Any]:
    """A model trained on a quarter of each row reads whole rows, with and without YaRN."""
    bench, dataset = Bench(args), args.datasets[0]
    _, manifest, _ = open_dataset(args.storage, dataset)
    plain = bench.trial(dataset, "ours", 1.0, 0, 1.0)
    quarter = manifest.sequence_len // 4
    found = apart(dataclasses.replace(plain, row_tokens=quarter, batch_rows=4 * args.batch_rows))
    print(
        f"trained at {quarter}: {found['bits_per_byte']:.4f} bits per byte within; tokens "
        f"{quarter} to {manifest.sequence_len}: {found['beyond_plain']:.4f} as it is, "
        f"{found['beyond_yarn']:.4f} with YaRN"
    )
    return found


def main(args: Args) -> None:
    if args.child:
        print(json.dumps(run_trial(Trial(**json.loads(args.child)))))
        return
    parts = {"learn": learn, "ablation": ablation, "extension": extension}
    print(json.dumps(parts[args.what](args)))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
