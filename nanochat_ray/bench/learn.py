"""Measure learning: tokens and seconds to the bits per byte that AdamW reaches, for each optimizer.

    nanochat-ray bench learn --datasets base bible --nanochat ../nanochat

One model, one order of rows, four optimizers: torch's AdamW with one rate for all parameters;
AdamW with our rates for embeddings, head and scalars and five to choose from for the matrices;
nanochat's with its own schedules (from a checkout); and ours. Each AdamW gets ``--steps`` steps
with each of five rates and, at the best, three seeds; what it reaches on held-out text is a target.
The others get five rates each at a shorter horizon, then three seeds at several horizons, each run
annealed to its end; the horizon that just reaches a target is interpolated. Seconds are those of
the processor, which other load does not change much. The last line is one JSON object.

    nanochat-ray bench learn --what ablation     what each option of model and optimizer gives
    nanochat-ray bench learn --what extension    trained at T, held-out text of 4T, by YaRN
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from nanochat_ray.bench.environment import own_process
from nanochat_ray.bench.learn_trial import Trial, build, ours, run_trial
from nanochat_ray.checks import check_float, check_int, check_name
from nanochat_ray.data.shards import SequenceReader
from nanochat_ray.storage import default_root
from nanochat_ray.train.data_loader import ShardDataLoader, open_dataset
from nanochat_ray.train.step import Batch

FACTORS = {
    "adamw": (0.001, 0.002, 0.004, 0.008, 0.016),
    "adamw by kind": (0.001, 0.002, 0.004, 0.008, 0.016),
    "nanochat": (0.25, 0.5, 1.0, 2.0, 4.0),
    "ours": (0.5, 0.7, 1.0, 1.4, 2.0),
}
"""AdamW: the rate. nanochat: a factor on its rates, which were tuned at depth 12. Ours: a factor on
what ``recipe.optim_config`` gives."""
TARGETS = ("adamw", "adamw by kind")


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    datasets: tuple[str, ...] = ("base",)
    nanochat: Path | None = None
    """Checkout of nanochat; without it only AdamW and ours are compared."""
    depth: int = 4
    width: int = 128
    global_batch_size: int = 4
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
    eval_sequences: int = 96
    child: str = ""
    """Internal: one run, as JSON."""

    def __post_init__(self) -> None:
        for name in self.datasets:
            check_name("datasets", name)
        for name in (
            "depth",
            "width",
            "global_batch_size",
            "steps",
            "seeds",
            "jobs",
            "eval_sequences",
        ):
            check_int(name, getattr(self, name), 1)
        for share in (self.tuned_at, *self.horizons):
            check_float("horizons", share, 0, 1, above=True)


class Bench:
    """Runs trials in processes of their own, ``jobs`` at a time, and remembers what they gave."""

    def __init__(self, args: Args):
        self.args = args
        self.pool = ThreadPoolExecutor(args.jobs)

    def trial(self, dataset: str, system: str, rate: float, seed: int, share: float) -> Trial:
        a = self.args
        return Trial(
            storage=a.storage,
            dataset=dataset,
            system=system,
            rate=rate,
            seed=seed,
            steps=max(1, round(a.steps * share)),
            depth=a.depth,
            width=a.width,
            global_batch_size=a.global_batch_size,
            eval_sequences=a.eval_sequences,
            nanochat=str(a.nanochat or ""),
        )

    def run(self, trials: list[Trial]) -> list[dict[str, float]]:
        return list(self.pool.map(apart, trials))


def apart(trial: Trial) -> dict[str, float]:
    """The trial in a process of its own; prints a line."""
    metrics: dict[str, float] = json.loads(own_process("learn", dataclasses.asdict(trial)))
    overrides = {**trial.model, **trial.optim}
    print(
        f"  {trial.dataset} {trial.system:<8} rate {trial.rate:<6g} seed {trial.seed} "
        f"{trial.steps:>5} steps  {metrics['bits_per_byte']:.4f} bits per byte  "
        f"{metrics['seconds']:.0f} s  {overrides or ''}",
        flush=True,
    )
    return metrics


def horizon_at(target: float, points: list[tuple[float, float]]) -> float | None:
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
    """Tokens and seconds to the targets, as shares of what each AdamW took, for each system."""
    args = bench.args
    seeds = range(args.seeds)

    def best(system: str, share: float) -> float:
        trials = [bench.trial(dataset, system, rate, 0, share) for rate in FACTORS[system]]
        results = bench.run(trials)
        return min(zip(results, trials, strict=True), key=lambda x: x[0]["bits_per_byte"])[1].rate

    targets: dict[str, dict[str, float]] = {}
    for system in TARGETS:
        rate = best(system, 1.0)
        runs = bench.run([bench.trial(dataset, system, rate, seed, 1.0) for seed in seeds])
        bits = statistics.mean(r["bits_per_byte"] for r in runs)
        seconds_per_run = statistics.median(r["seconds"] for r in runs)
        targets[system] = {"rate": rate, "bits_per_byte": bits, "seconds": seconds_per_run}
        print(f"{dataset}: {system} at {rate:g} reaches {bits:.4f} bits per byte", flush=True)
    lowest = min(target["bits_per_byte"] for target in targets.values())
    result: dict[str, Any] = {"targets": targets}
    for system in ("ours", "nanochat") if args.nanochat else ("ours",):
        rate = best(system, args.tuned_at)
        points, cost = [], []
        for share in args.horizons:
            runs = bench.run([bench.trial(dataset, system, rate, s, share) for s in seeds])
            points.append((share, statistics.mean(r["bits_per_byte"] for r in runs)))
            cost.append(statistics.median(r["seconds"] for r in runs) / share)
            if points[-1][1] <= lowest:
                break
        mine: dict[str, Any] = {"rate": rate, "points": points}
        result[system] = mine
        for name, target in targets.items():
            tokens = horizon_at(target["bits_per_byte"], points)
            seconds = tokens * statistics.median(cost) / target["seconds"] if tokens else None
            mine[name] = {"tokens": tokens, "seconds": seconds}
            token_text = f"{tokens:.3f}" if tokens else f"more than {args.horizons[-1]}"
            time_text = f"{seconds:.3f}" if seconds else "?"
            print(
                f"{dataset}: {system} at {rate:g} needs {token_text} of the tokens and {time_text} "
                f"of the seconds of {name}",
                flush=True,
            )
    return result


def learn(args: Args) -> dict[str, float | None]:
    """The two ratios of the bench, each the worst over the datasets.

    AdamW is the one with one rate; nanochat's tokens are counted to the harder target.
    """
    bench = Bench(args)
    results = {dataset: compare(bench, dataset) for dataset in args.datasets}
    print(json.dumps(results))
    plain, harder = TARGETS
    own = [results[d]["ours"][plain]["tokens"] for d in args.datasets]
    result = {"tokens_vs_adamw": max(own) if all(own) else None, "tokens_vs_nanochat": None}
    if args.nanochat:
        mine = [results[d]["ours"][harder]["tokens"] for d in args.datasets]
        peers = [
            results[d]["nanochat"][harder]["tokens"] or args.horizons[-1] for d in args.datasets
        ]
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
    "no equilibration": {"optim": {"row_normalize": False}},
    "cautious decay": {"optim": {"cautious": True}},
    "no decay": {"optim": {"weight_decay": 0.0}},
    "warmdown 0.5": {"optim": {"warmdown_ratio": 0.5}},
}


def step_times(trials: list[Trial], repeats: int = 12) -> list[float]:
    """Median seconds of a step of each trial. The trials take turns, step by step, so that what
    else the machine does falls on all alike."""
    torch.set_num_threads(1)
    store, manifest, tokenizer = open_dataset(trials[0].storage, trials[0].dataset)
    reader = SequenceReader(store, manifest, "train")
    running = []
    for trial in trials:
        model, train = build(trial, tokenizer.vocab_size, manifest.sequence_len)
        running.append(
            (ours(model, train, trial), next(iter(ShardDataLoader(reader, train, 0, 1).batches(0))))
        )
    seconds: list[list[float]] = [[] for _ in trials]
    for i in range(repeats):
        for trial, (step, rows), step_seconds in zip(trials, running, seconds, strict=True):
            began = time.perf_counter()
            step(i * trial.steps // repeats, Batch(rows.ids))  # the whole of any schedule
            step_seconds.append(time.perf_counter() - began)
    return [statistics.median(step_seconds[1:]) for step_seconds in seconds]


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
    results = apart(
        dataclasses.replace(plain, row_tokens=quarter, global_batch_size=4 * args.global_batch_size)
    )
    print(
        f"trained at {quarter}: {results['bits_per_byte']:.4f} bits per byte within; tokens "
        f"{quarter} to {manifest.sequence_len}: {results['beyond_plain']:.4f} as it is, "
        f"{results['beyond_yarn']:.4f} with YaRN"
    )
    return results


def main(args: Args) -> None:
    if args.child:
        print(json.dumps(run_trial(Trial(**json.loads(args.child)))))
        return
    parts = {"learn": learn, "ablation": ablation, "extension": extension}
    print(json.dumps(parts[args.what](args)))
