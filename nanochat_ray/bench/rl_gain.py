"""Measure what reinforcement learning gives, and what it unlearns, over several seeds.

    nanochat-ray bench rl-gain --parent chat --steps 40

For each seed: ``nanochat-ray rl`` in one process, with its default tasks and --flags, as run
PREFIX-SEED; then ``nanochat-ray eval`` of what the default fine-tuning shows, and of a task that
nothing has shown. The parent is evaluated too: what it lacks, RL did not unlearn. What is complete
in the storage is not run again. The last line is one JSON object.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from nanochat_ray.bench import chart
from nanochat_ray.checks import check_int, check_name
from nanochat_ray.rl.config import DEFAULT_TASKS
from nanochat_ray.storage import absolute, default_root
from nanochat_ray.tasks.registry import DEFAULT_MIXTURE

PROGRAM = (sys.executable, "-m", "nanochat_ray")
NEW_TASKS = tuple(task for task in DEFAULT_TASKS if "," in task)
"""Harder than what fine-tuning shows."""
OLD_TASKS = tuple(entry.partition(":")[0] for entry in DEFAULT_MIXTURE)
TRANSFER_TASK = "chain_sum,min_digits=4,max_digits=4"
"""Neither fine-tuning nor RL shows it."""


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    parent: str = "chat"
    """Fine-tuned run."""
    prefix: str = "gain"
    """Of the names of the runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 40
    count: int = 200
    """Questions of each task that is evaluated, greedy."""
    flags: str = ""
    """Further flags of nanochat-ray rl."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        check_name("parent", self.parent)
        check_name("prefix", self.prefix)
        check_int("steps", self.steps, 1)
        check_int("count", self.count, 1)
        for seed in self.seeds:
            check_int("seeds", seed, 0)


@dataclass(frozen=True)
class Gain:
    """Of one seed; shares from 0 to 1."""

    seed: int
    before: float
    """Mean pass@1 of the new tasks, sampled as in training."""
    after: float
    accuracy: dict[str, float]
    """Greedy, of each of the old tasks and of ``TRANSFER_TASK``."""


def last_object(command: str, args: Args, *flags: str) -> dict[str, Any]:
    """What ``nanochat-ray COMMAND`` prints at its end. CalledProcessError if it fails."""
    argv = [*PROGRAM, command, "--storage", args.storage, *flags]
    process = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def accuracies(args: Args, run: str) -> dict[str, float]:
    tasks = ("--tasks", *OLD_TASKS, TRANSFER_TASK)
    result: dict[str, float] = last_object(
        "eval", args, "--run", run, "--count", str(args.count), *tasks
    )["accuracy"]
    return result


def measure(args: Args, seed: int) -> Gain:
    run, steps = f"{args.prefix}-{seed}", str(args.steps)
    flags = ["--parent", args.parent, "--steps", steps, "--eval-every", steps, "--seed", str(seed)]
    rl = last_object("rl", args, "--run", run, "--no-ray", *flags, *shlex.split(args.flags))
    before, after = (
        statistics.mean(rl[f"{prefix}pass@1/{task}"] for task in NEW_TASKS)
        for prefix in ("first_", "")
    )
    return Gain(seed, before, after, accuracies(args, run))


def table(parent: dict[str, float], gains: Sequence[Gain]) -> str:
    """A row for each task, in percent: of the parent, and after each seed's run."""
    head = ["percent", "before", *(f"seed {gain.seed}" for gain in gains), "mean ± deviation"]
    before = statistics.mean(gain.before for gain in gains)
    rows = [("new tasks, pass@1", before, [gain.after for gain in gains])]
    rows += [(task, parent[task], [g.accuracy[task] for g in gains]) for task in parent]
    lines = []
    for name, first, after in rows:
        spread = f" ± {100 * statistics.stdev(after):.1f}" if len(after) > 1 else ""
        cells = [f"{100 * share:.1f}" for share in (first, *after, statistics.mean(after))]
        lines.append([name, *cells[:-1], cells[-1] + spread])
    return chart.markdown(head, *lines)


def main(args: Args) -> None:
    parent = accuracies(args, args.parent)
    gains = []
    for seed in args.seeds:
        gains.append(measure(args, seed))
        print(table(parent, gains[-1:]), file=sys.stderr, flush=True)
    print(table(parent, gains))
    print(json.dumps({"before": parent, "seeds": [dataclasses.asdict(gain) for gain in gains]}))
