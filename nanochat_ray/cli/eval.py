"""Measure a chat model on fresh questions of tasks, a base model by CORE, any by bits per byte.

    nanochat-ray eval --storage DIR --run chat --tasks chain_sum products --count 200
    nanochat-ray eval --storage DIR --run base --text books/ news.jsonl
    nanochat-ray eval --storage DIR --run base --core bundle    # or a folder or .zip with its files
    nanochat-ray eval --run chat --checkpoint all --tasks gsm8k,path=data/gsm8k --max-tokens 512
    nanochat-ray eval --run chat --engines 4              # on Ray
    nanochat-ray eval --run chat --endpoint nanochat      # on the replicas that serve

Figures are stored beside the checkpoint (evals/step-000200.json of the run) and shown in the run's
report.html; any number of engines gives the same ones. A command that is killed continues: a task,
also of CORE, that is measured, and each answer that is stored, is not computed again. Bits per byte
are.

The last line is one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanochat_ray.checks import check_float, check_int, check_name, require
from nanochat_ray.cli.eval_core import core_figures
from nanochat_ray.cli.eval_tasks import task_figures
from nanochat_ray.cli.flags import EVERYDAY, overrides
from nanochat_ray.data import corpus, sources
from nanochat_ray.engine.config import GUEST_DEFAULTS, EngineConfig
from nanochat_ray.evals.core_data import MAX_SHOTS
from nanochat_ray.evals.results import Results, engine_settings
from nanochat_ray.storage import Store, absolute, default_root
from nanochat_ray.tasks.registry import make_task
from nanochat_ray.tasks.task import MAX_ANSWER_TOKENS, Task
from nanochat_ray.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanochat_ray.engine.offline import OfflineEngine
    from nanochat_ray.model.gpt import GPT

    EngineFlags = dict[str, Any]
    MakeEngine = Callable[[GPT, Tokenizer, EngineConfig], OfflineEngine]
else:
    EngineFlags = overrides(EngineConfig)

CHAT_TASKS = ("chain_sum", "leg_counting", "products")


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds the runs."""
    run: str = "chat"
    """Run to measure."""
    checkpoint: str = ""
    """step-000200, best by validation, or all; by default the latest."""
    tasks: tuple[str, ...] | None = None
    """Tasks; without --text, a chat model's are chain_sum leg_counting products."""
    count: int = 200
    """Questions of each task, none of them trained on. Fewer where a task has fewer."""
    samples: int = 1
    """Answers to each question; of k of them also pass@k."""
    grade_threads: int = 1
    """Answers that are graded at once. More help where a grader waits and allows threads."""
    max_tokens: int = MAX_ANSWER_TOKENS
    """Of an answer; nanochat takes 512 for gsm8k."""
    temperature: float | None = None
    """Of the answers; by default 0, greedy, for one answer, and 1 for several."""
    text: tuple[str, ...] = ()
    """Files, folders, globs, s3:// or hf:// to measure bits per byte on."""
    text_tokens: int = 1_000_000
    """Tokens of that text, at most; 0 is all."""
    core: str = ""
    """Measures CORE, 22 tasks for base models. A folder or .zip with their files, or "bundle":
    those that nanochat publishes."""
    core_count: int = 0
    """Questions of each of its tasks, at most; 0 is all."""
    seed: int = 1
    """Seed of the questions."""
    engines: int = 0
    """Ray: engines that share the questions, each an actor; 0: one engine in this process."""
    endpoint: str = ""
    """Ray: a Serve application whose replicas answer. They do so in the time that users leave, in
    place of --engines. nanochat-ray serve starts "nanochat"."""
    device: str = "cpu"
    """cpu, cuda or cuda:1; with --engines, cuda is a GPU for each. Replicas have their own."""
    threads: int = 0
    """Torch threads of each engine on a CPU; 0 is its share of all cores but one."""
    engine: EngineFlags = field(
        default_factory=dict, metadata={EVERYDAY: ("precision", "max_num_seqs")}
    )
    show_wrong: int = 2
    """Wrong answers that are shown for each task."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        check_name("run", self.run)
        if self.checkpoint:
            check_name("checkpoint", self.checkpoint)
        for name in ("count", "samples", "max_tokens", "grade_threads"):
            check_int(name, getattr(self, name), 1, 1 << 30)
        for name in ("seed", "threads", "engines"):
            check_int(name, getattr(self, name), 0, 1 << 30)
        check_int("show_wrong", self.show_wrong, 0)
        if self.temperature is None:
            object.__setattr__(self, "temperature", float(self.samples > 1))
        check_float("temperature", self.temperature)
        check_int("text_tokens", self.text_tokens, 0)
        enough = self.core_count == 0 or self.core_count > MAX_SHOTS
        requirement = f"0, or more than {MAX_SHOTS}, the examples before a question"
        require(enough, "core_count", self.core_count, requirement)
        require(all(self.text), "text", self.text, "files, folders, globs or URIs")
        if self.endpoint:
            require(not self.engines, "engines", self.engines, "not with --endpoint")
        if self.on_ray:
            require(self.device in ("cpu", "cuda"), "device", self.device, "on Ray, cpu or cuda")
        else:
            check_device("device", self.device)

        self.engine_config()

    def engine_config(self) -> EngineConfig:
        defaults = GUEST_DEFAULTS[self.device] if self.endpoint else {}
        return EngineConfig(**{**defaults, **self.engine})

    @property
    def on_ray(self) -> bool:
        return bool(self.engines or self.endpoint)


def check_device(field: str, name: str) -> None:
    """ValueError if torch has no such device here."""
    choices = "cpu, or cuda where this machine has a CUDA device"
    ok = re.fullmatch(r"cpu|cuda(:\d+)?", name) is not None
    if ok and name != "cpu":
        import torch

        ok = int(name.partition(":")[2] or 0) < torch.cuda.device_count()
    require(ok, field, name, choices)


def training_figures(args: Args, trainer: dict[str, Any]) -> dict[str, float]:
    """Bits per byte, before training and after, of the base model that the run came from."""
    from nanochat_ray.checkpoint import checkpoint

    ancestors: list[str] = []
    while (parent := trainer.get("about", {}).get("parent")) and parent not in ancestors:
        ancestors.append(parent)
        run = Store.at(args.storage).child("runs", parent)
        if checkpoint.latest(run) is None:
            print(f"base model: run {parent} is gone, and its figures with it", flush=True)
            return {}
        trainer = checkpoint.load_trainer(run)
    metrics = trainer.get("metrics", {})
    if not {"first_bits_per_byte", "bits_per_byte"} <= metrics.keys():
        return {}
    before, after = metrics["first_bits_per_byte"], metrics["bits_per_byte"]
    print(
        f"base model, bits per byte of the validation split: {before:.3f} before, {after:.3f} after"
    )
    return {"bits_per_byte_before": before, "bits_per_byte": after}


def documents(text: Sequence[str]) -> Iterator[str]:
    for unit in sources.units(sources.find(list(text))):
        yield from corpus.read(unit)


def text_figures(
    args: Args, engine: OfflineEngine, tokenizer: Tokenizer, results: Results
) -> dict[str, float]:
    """Bits per byte of --text."""
    from nanochat_ray.evals.bpb import evaluate_text

    start = time.perf_counter()
    score = evaluate_text(engine, tokenizer, documents(args.text), max_tokens=args.text_tokens)
    print(
        f"text: {score.bits_per_byte:.4f} bits per byte of {score.bytes:,} bytes ({score.tokens:,} "
        f"tokens of {score.documents:,} documents) in {time.perf_counter() - start:.1f} s, "
        f"{engine.config.precision}",
        flush=True,
    )
    settings = {"text_tokens": args.text_tokens, **engine_settings(engine)}
    figures = {"bits_per_byte": score.bits_per_byte, "bytes": score.bytes}
    results.store("text", " ".join(args.text), settings, figures)
    return {"text_bits_per_byte": score.bits_per_byte, "text_bytes": score.bytes}


def checkpoints(args: Args, store: Store) -> list[str]:
    """The checkpoints to measure, the oldest first."""
    from nanochat_ray.checkpoint import checkpoint

    if args.checkpoint != "all":
        return [checkpoint.resolve(store, args.checkpoint)]
    complete = [name for name in checkpoint.names(store) if checkpoint.is_complete(store, name)]
    if not complete:
        raise ValueError(f"run {store.uri} has no checkpoint")
    return complete[::-1]


def make_tasks(args: Args, names: Sequence[str]) -> list[Task]:
    return [make_task(name, "test", size=args.count, seed=args.seed) for name in names]


def checkpoint_figures(
    args: Args, store: Store, name: str, make_engine: MakeEngine, tasks: Sequence[Task]
) -> dict[str, Any]:
    """Measures one checkpoint and stores its figures beside it."""
    from nanochat_ray.checkpoint import checkpoint
    from nanochat_ray.evals.bpb import scoring_config
    from nanochat_ray.evals.core import core_engine_config

    config = args.engine_config()
    trainer = checkpoint.load_trainer(store, name)
    is_base = trainer.get("train_config", {}).get("stage") == "base"
    if args.tasks is None and not args.text and not args.core and not is_base:
        tasks = make_tasks(args, CHAT_TASKS)
    model, tokenizer = load_model(args, store, name, config)
    result: dict[str, Any] = training_figures(args, trainer)
    results = Results(store, name, checkpoint.weight_version(store, name))
    # Each engine is freed before the next one takes its memory: no variable holds one.
    if args.text:
        scoring = scoring_config(model.config, config)
        result |= text_figures(args, make_engine(model, tokenizer, scoring), tokenizer, results)
    if tasks:
        result |= task_figures(
            args, make_engine(model, tokenizer, config), tokenizer, tasks, results
        )
    if args.core:
        core_config = core_engine_config(model.config, config)
        engine = make_engine(model, tokenizer, core_config)
        result |= core_figures(engine, tokenizer, args.core, args.core_count, results)
    return result


def load_model(args: Args, store: Store, name: str, config: EngineConfig) -> tuple[GPT, Tokenizer]:
    from nanochat_ray.checkpoint import checkpoint
    from nanochat_ray.engine.precision import checkpoint_dtype

    if args.on_ray:
        return checkpoint.load_model(store, name)  # the engines round the weights
    dtype = checkpoint_dtype(config.precision)
    return checkpoint.load_model(store, name, device=args.device, dtype=dtype)


@contextlib.contextmanager
def open_engines(args: Args, store: Store) -> Iterator[MakeEngine]:
    """Makes an engine of this process, or one of many on Ray. One at a time."""
    import torch

    from nanochat_ray.engine.offline import LocalEngine
    from nanochat_ray.machine import engine_threads

    threads = args.threads or engine_threads(sharing=args.engines or 1)
    torch.set_num_threads(threads)
    if not args.on_ray:
        yield LocalEngine.from_model
        return
    from nanochat_ray.on_ray import session
    from nanochat_ray.on_ray.evals import open_fleets

    session.connect()
    gpus = args.device == "cuda"
    session.check_gpus(args.engines if gpus else 0)
    with open_fleets(
        store, engines=args.engines, endpoint=args.endpoint, gpus=gpus, threads=threads
    ) as make_fleet:
        yield make_fleet


def main(args: Args) -> None:
    from nanochat_ray.train import eval_report

    tasks = make_tasks(args, args.tasks or ())
    store = Store.at(args.storage).child("runs", args.run)
    results: dict[str, dict[str, Any]] = {}
    names = checkpoints(args, store)
    with open_engines(args, store) as make_engine:
        for name in names:
            if args.checkpoint == "all":
                print(f"{args.run}/{name}", flush=True)
            results[name] = checkpoint_figures(args, store, name, make_engine, tasks)
    eval_report.update(store)
    if args.checkpoint == "all":
        print(json.dumps({"run": args.run, "checkpoints": results}))
    else:
        (name,) = results
        print(json.dumps({"run": args.run, "checkpoint": name, **results[name]}))
