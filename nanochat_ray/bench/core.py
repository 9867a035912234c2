"""CORE by our engine and by a checkout of nanochat, on equal weights: do they decide alike?

    nanochat-ray bench core --nanochat ../nanochat --core bundle --run base
    nanochat-ray bench core --nanochat ../nanochat --core eval_data/ --run base --count 100

Both get the same questions, our tokenizer and the run's weights, in float32 on the CPU. nanochat's
side is its own ``core_eval.evaluate_example`` over its own ``GPT``. They take turns, a task each.
Of each question that they decide differently the margin is printed: how far nanochat's two best
answers are apart. The last line is one JSON object.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nanochat_ray.bench import nanochat_checkout
from nanochat_ray.bench.environment import machine
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import check_int, check_name, require
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.offline import LocalEngine
from nanochat_ray.evals import core, core_data
from nanochat_ray.evals.core_data import CoreTask, Example
from nanochat_ray.storage import Store, absolute, cache_root, default_root
from nanochat_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Args:
    nanochat: Path
    """Checkout of nanochat."""
    core: str
    """Folder or .zip with the tasks' files, or "bundle": those that nanochat publishes."""
    storage: str = field(default_factory=default_root)
    """Where the run is."""
    run: str = "base"
    """Run whose weights both get; it must be of an architecture that nanochat has."""
    checkpoint: str = ""
    """By default the latest."""
    tasks: tuple[str, ...] = ()
    """Tasks to compare, such as arc_easy; by default all whose files are there."""
    count: int = 110
    """Questions of each task, at most; 0 is all."""
    threads: int = 1
    """Torch threads of each side."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        check_name("run", self.run)
        check_int("threads", self.threads, 1, 1 << 10)
        labels = [task.label for task in core_data.TASKS]
        for label in self.tasks:
            require(label in labels, "tasks", label, ", ".join(labels))
        check_int("count", self.count, 0)
        enough = self.count == 0 or self.count > core_data.MAX_SHOTS
        requirement = f"0, or more than {core_data.MAX_SHOTS}, the examples before a question"
        require(enough, "count", self.count, requirement)


class Peer:
    """nanochat's evaluation of our weights."""

    def __init__(self, checkout: Path, model: Any, tokenizer: Tokenizer):
        self.model = nanochat_checkout.model_of(str(checkout), model)
        self._core_eval = importlib.import_module("nanochat.core_eval")
        self._tokenizer = _PeerTokenizer(tokenizer)

    def decide(self, task: CoreTask, examples: Sequence[Example]) -> list[bool | None]:
        """None: not at all, since a text is longer than its ten contexts."""
        meta = {
            "task_type": task.kind,
            "num_fewshot": task.num_shots,
            "continuation_delimiter": task.delimiter,
        }
        arguments = (self.model, self._tokenizer, examples, "cpu", meta)

        def decide_one(i: int) -> bool | None:
            try:
                return bool(self._core_eval.evaluate_example(i, *arguments))
            except AssertionError:
                options = core.question(task, self._tokenizer.ours, examples, i).options
                if max(len(option.token_ids) for option in options) <= self.model.cos.size(1):
                    raise
                return None

        return [decide_one(i) for i in range(len(examples))]


class _PeerTokenizer:
    """What ``core_eval`` calls of nanochat's tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.ours = tokenizer

    def get_bos_token_id(self) -> int:
        return self.ours.bos

    def __call__(self, prompts: list[str], prepend: int) -> list[list[int]]:
        return [[prepend, *self.ours.encode(prompt)] for prompt in prompts]


class Difference(NamedTuple):
    """A question that the two decide differently."""

    task: str
    question: int
    margin: float
    """See ``margin``."""


class Seconds(NamedTuple):
    """What one side took."""

    wall: float
    cpu: float
    """Of the process: what else the machine does counts little."""

    @classmethod
    def now(cls) -> Seconds:
        return cls(time.perf_counter(), time.process_time())

    def since(self, start: Seconds) -> Seconds:
        return Seconds(self.wall - start.wall, self.cpu - start.cpu)


@dataclass(frozen=True)
class Comparison:
    """One task, decided by both."""

    label: str
    questions: int
    """That nanochat can decide. The times are those of all."""
    correct: int
    """By ours."""
    seconds: Seconds
    peer_seconds: Seconds
    differences: list[Difference]


def compare(
    task: CoreTask,
    examples: Sequence[Example],
    ours: Callable[[], Sequence[bool]],
    theirs: Callable[[], Sequence[bool | None]],
    margin_of: Callable[[int], float],
) -> Comparison:
    """Runs both sides over ``examples`` and times them."""
    start = Seconds.now()
    decisions = ours()
    middle = Seconds.now()
    peer_decisions = theirs()
    peer_seconds = Seconds.now().since(middle)
    pairs = [
        (i, a, b)
        for i, (a, b) in enumerate(zip(decisions, peer_decisions, strict=True))
        if b is not None
    ]
    differences = [Difference(task.label, i, margin_of(i)) for i, a, b in pairs if a != b]
    num_correct = sum(a for _, a, _ in pairs)
    seconds = middle.since(start)
    return Comparison(task.label, len(pairs), num_correct, seconds, peer_seconds, differences)


@torch.inference_mode()
def margin(logits_of: Callable[[Tensor], Tensor], item: core.Question) -> float:
    """How little decides a question: nats between the mean losses of its two likeliest options, or
    the least difference of logits, over the answer's tokens, between the two likeliest tokens.

    ``logits_of``: int64 ``[1, T]`` → ``[1, T, V]``.
    """
    means, least = [], float("inf")
    for option in item.options:
        ids = torch.tensor([option.token_ids])
        logits_TV = logits_of(ids)[0, option.start - 1 : -1].double()
        if not len(logits_TV):
            continue
        top = logits_TV.topk(2).values
        least = min(least, float((top[:, 0] - top[:, 1]).min()))
        targets = ids[0, option.start :, None]
        means.append(-float(logits_TV.log_softmax(-1).gather(1, targets).mean()))
    if item.answer is None:
        return least
    first, second = sorted(means)[:2] if len(means) > 1 else (0.0, 0.0)
    return second - first


def choose_tasks(args: Args, paths: Mapping[str, Path]) -> list[CoreTask]:
    """Those to compare whose files are there. ValueError without one."""
    tasks = [t for t in core_data.TASKS if not args.tasks or t.label in args.tasks]
    tasks = [t for t in tasks if t.file in paths]
    require(bool(tasks), "tasks", args.tasks, f"tasks whose files are in {args.core}")
    return tasks


def compare_task(
    task: CoreTask,
    examples: Sequence[Example],
    engine: LocalEngine,
    tokenizer: Tokenizer,
    peer: Peer,
) -> Comparison:
    """Compares the decisions of ``engine`` with those of ``peer``."""

    def margin_of(i: int) -> float:
        return margin(peer.model, core.question(task, tokenizer, examples, i))

    def ours() -> Sequence[bool]:
        return core.evaluate(engine, tokenizer, task, examples)[1]

    return compare(task, examples, ours, lambda: peer.decide(task, examples), margin_of)


def _sum(seconds: Sequence[Seconds]) -> Seconds:
    return Seconds(sum(s.wall for s in seconds), sum(s.cpu for s in seconds))


def table(comparisons: Sequence[Comparison]) -> str:
    """The comparisons as a table in Markdown, with a line for all."""
    total = Comparison(
        "all",
        sum(c.questions for c in comparisons),
        sum(c.correct for c in comparisons),
        _sum([c.seconds for c in comparisons]),
        _sum([c.peer_seconds for c in comparisons]),
        [difference for c in comparisons for difference in c.differences],
    )
    lines = [
        "| task | questions | equal | right | questions/s | nanochat's | ratio | of CPU time |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|"]
    lines += [
        f"| {c.label} | {c.questions} | {c.questions - len(c.differences)} | {c.correct} | "
        f"{c.questions / c.seconds.wall:.2f} | {c.questions / c.peer_seconds.wall:.2f} | "
        f"{c.peer_seconds.wall / c.seconds.wall:.1f} | {c.peer_seconds.cpu / c.seconds.cpu:.1f} |"
        for c in [*comparisons, total]
    ]
    return "\n".join(lines)


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    paths = core_data.find_files(args.core, cache_root() / "evals")
    tasks = choose_tasks(args, paths)
    run = Store.at(args.storage).child("runs", args.run)
    name = checkpoint.resolve(run, args.checkpoint)
    model, tokenizer = checkpoint.load_model(run, name)
    engine = LocalEngine.from_model(
        model, tokenizer, core.core_engine_config(model.config, EngineConfig())
    )
    peer = Peer(args.nanochat, model, tokenizer)
    print(f"{machine()}; {args.threads} threads; {args.run}/{name}", flush=True)
    comparisons = []
    for task in tasks:
        examples = core.choose(core_data.load(task, paths[task.file]), args.count)
        comparisons.append(compare_task(task, examples, engine, tokenizer, peer))
        print(table(comparisons[-1:]).splitlines()[2], flush=True)
        for difference in comparisons[-1].differences:
            print(f"    question {difference.question}: margin {difference.margin:.2e}", flush=True)
    print(table(comparisons))
    print(json.dumps({"tasks": [asdict(c) for c in comparisons]}))
