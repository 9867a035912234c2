"""Measure a chat model on fresh questions of tasks, and a base model's text on held-out rows.

    python jobs/eval.py --storage DIR --run chat --tasks chain_sum products --count 200

The last line is one JSON object.
"""

from __future__ import annotations

import json
import re
import time
from dataclasses import dataclass, field

import torch

from nanochat_ray.checkpoint import snapshot
from nanochat_ray.checks import check_int, check_name, require
from nanochat_ray.cli import entry
from nanochat_ray.config import EngineConfig, Precision
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.tools import calculator_tool
from nanochat_ray.evals.tasks import evaluate
from nanochat_ray.machine import engine_threads
from nanochat_ray.storage import Store, absolute, default_root
from nanochat_ray.tasks.registry import make_task
from nanochat_ray.train.job import DTYPES


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    run: str = "chat"
    snapshot: str = ""
    """Checkpoint to measure: step-000200, or best by validation; by default the latest."""
    tasks: tuple[str, ...] = ("chain_sum", "leg_counting", "products")
    count: int = 200
    """Questions of each task, none of which was trained on."""
    seed: int = 1
    precision: Precision = "fp32"
    device: str = "cpu"
    threads: int = 0
    """Torch threads on a CPU; 0 is all cores but one."""
    slots: int = 32
    show_wrong: int = 2
    """Wrong answers that are shown for each task."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        check_name("run", self.run)
        if self.snapshot:
            check_name("snapshot", self.snapshot)
        for name, least in (("count", 1), ("seed", 0), ("threads", 0), ("slots", 1)):
            check_int(name, getattr(self, name), least, 1 << 30)
        check_int("show_wrong", self.show_wrong, 0)
        check_device("device", self.device)


def check_device(field: str, name: str) -> None:
    """ValueError if torch has no such device here."""
    allowed = "cpu, or cuda where this machine has a CUDA device"
    ok = re.fullmatch(r"cpu|cuda(:\d+)?", name) is not None
    if ok and name != "cpu":
        ok = int(name.partition(":")[2] or 0) < torch.cuda.device_count()
    require(ok, field, name, allowed)


def text_figures(args: Args) -> dict[str, float]:
    """Bits per byte, before training and after, of the base model that the run came from."""
    root = Store.at(args.storage)
    parent = snapshot.load_trainer(root.child("runs", args.run))["about"].get("parent")
    metrics = snapshot.load_trainer(root.child("runs", parent or args.run))["metrics"]
    if "bits_per_byte" not in metrics:
        return {}
    before, after = metrics["first_bits_per_byte"], metrics["bits_per_byte"]
    print(f"base model, bits per byte of held-out text: {before:.3f} before, {after:.3f} after")
    return {"bits_per_byte_before": before, "bits_per_byte": after}


def main(args: Args) -> None:
    torch.set_num_threads(args.threads or engine_threads(sharing=1))
    store = Store.at(args.storage).child("runs", args.run)
    tasks = [make_task(name, "test", size=args.count, seed=args.seed) for name in args.tasks]
    dtype = DTYPES[args.precision]
    name = snapshot.chosen(store, args.snapshot)
    model, tokenizer = snapshot.load_model(store, name, device=args.device, dtype=dtype)
    config = EngineConfig(max_slots=args.slots, precision=args.precision)
    engine = Engine(model, config, calculator_tool(tokenizer))
    found = text_figures(args)
    accuracy = {}
    for task in tasks:
        began = time.perf_counter()
        score = evaluate(engine, tokenizer, task, count=args.count)
        accuracy[score.name] = score.accuracy
        print(
            f"{score.name:<18} {score.correct}/{score.total} right ({score.accuracy:.1%}) in "
            f"{time.perf_counter() - began:.1f} s",
            flush=True,
        )
        for question, answer in score.wrong[: args.show_wrong]:
            print(f"    wrong: {question!r} → {answer!r}")
    engine.check_integrity()
    print(json.dumps({"run": args.run, **found, "accuracy": accuracy, "questions": args.count}))


if __name__ == "__main__":
    entry.run(main, Args, __doc__)
