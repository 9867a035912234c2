"""From raw text to a chat answer over HTTP, on Ray, with one command.

    nanochat-ray quickstart
    nanochat-ray quickstart --text my/books/ more/*.jsonl.gz
    nanochat-ray quickstart --gpus 8 --depth 20

Run again, it continues: no stage that is complete runs twice. Ctrl-C, or nanochat-ray stop, ends
what it started and nothing else.
"""

from __future__ import annotations

import json
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from nanochat_ray.checks import check_float, check_int, check_port, require
from nanochat_ray.cli.quickstart_jobs import Jobs
from nanochat_ray.on_ray.local_cluster import LocalCluster, print_step
from nanochat_ray.storage import Store, absolute, default_root

PROMISE_S = 690
"""Seconds that all of it may take on a CPU, before the answers: the promise is 12 minutes."""
MOST_MINUTES = 5.2
SFT_MINUTES, MOST_SFT_MINUTES = 2.0, 4.0
RL_STEPS = 50
"""Steps of reinforcement learning."""
REST, RL_REST = 4.0, 4.5
"""What is neither base training nor fine-tuning takes this many times as long as preparing the
text, on a fast and on a slow machine; and so many times more for ``RL_STEPS``."""
LATER, RL_LATER = 0.8, 1.6
"""The same for what is left when fine-tuning begins, relative to all but training before it, which
says more of a machine than preparing the text alone."""
QUESTIONS = ("Who are you?", "What is 47 + 38 - 9?")


@dataclass(frozen=True, kw_only=True)
class Args:
    text: tuple[str, ...] | None = None
    """Files, folders, globs, s3:// or hf://; by default this machine's documentation."""
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// for data and checkpoints."""
    depth: int = 4
    """Layers of the model; all else is derived from it."""
    gpus: int = 0
    """GPUs to train on; 0 is two workers on the CPU."""
    minutes: float | None = None
    """CPU: minutes of base training; by default all takes about 12 minutes. Fine-tuning takes half
    as long: at least 2 minutes, or as long as base training if that is less; 2 passes at most."""
    rl_steps: int | None = None
    """Steps of learning from graded answers; 0: none. By default 50, on GPUs 0."""
    port: int = 8000
    """Port of the endpoint."""
    stay: bool = False
    """Wait for Ctrl-C at the end; the default at a terminal."""
    leave: bool = False
    """Leave the endpoint up and return."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        if self.text is not None:
            ok = bool(self.text) and all(self.text)
            require(ok, "text", self.text, "one or more files, folders, globs or URIs")
            object.__setattr__(self, "text", tuple(map(_absolute, self.text)))
        check_int("depth", self.depth, 1, 1 << 30)
        check_int("gpus", self.gpus, 0, 1 << 30)
        check_port("port", self.port)
        if self.rl_steps is None:
            object.__setattr__(self, "rl_steps", 0 if self.gpus else RL_STEPS)
        else:
            check_int("rl_steps", self.rl_steps, 0, 1 << 30)
            require(not (self.gpus and self.rl_steps), "rl_steps", self.rl_steps, "0 with --gpus")
        if self.minutes is not None:
            check_float("minutes", self.minutes, above=True)
            require(not self.gpus, "--minutes", self.minutes, "only on a CPU, not with --gpus")
        require(not (self.stay and self.leave), "--stay", True, "not with --leave")


def _absolute(name: str) -> str:
    """A path that does not depend on a job's working directory; URIs stay as they are."""
    return name if "://" in name else str(Path(name).expanduser().absolute())


def main(args: Args) -> None:
    signal.signal(signal.SIGTERM, _on_term)
    start = time.monotonic()
    cluster = LocalCluster(args.port)
    cluster.logs.mkdir(parents=True, exist_ok=True)
    with _cluster_for(cluster, args.gpus):
        jobs = Jobs(cluster, args.storage, tag(args), gpus=args.gpus)
        if run_is_complete(args.storage, jobs.chat_run):
            print_step(f"1–4/6 run {jobs.chat_run} is trained already")
        else:
            train(args, jobs, start)
        serve(args, jobs, learn(args, jobs), start)
        if args.stay or (not args.leave and sys.stdin.isatty() and sys.stdout.isatty()):
            print_step("Ctrl-C stops it")
            while cluster.is_alive():
                time.sleep(5)
            raise ValueError(f"Ray has ended by itself; see {cluster.logs}")


def _on_term(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def _cluster_for(cluster: LocalCluster, gpus: int) -> Iterator[None]:
    """A cluster that is up. One that is started here ends with an error; one that was up stays."""
    if cluster.is_alive():
        print_step(f"Ray is up at {cluster.variables()['RAY_API_SERVER_ADDRESS']}")
        yield
        return
    try:
        cluster.start(gpus)
        yield
    except BaseException:
        print_step(f"stopped {cluster.stop()} processes of port {cluster.port}")
        raise


def train(args: Args, jobs: Jobs, start: float) -> None:
    """The first four stages: both datasets and both runs."""
    training_s = 0.0
    if not run_is_complete(args.storage, jobs.base_run):
        print_step(f"1/6 preparing the text (log: {jobs.log('prepare-base')})")
        preparing = time.monotonic()
        jobs.prepare_base(args.text or ())
        now = time.monotonic()
        minutes, text = None, ""
        if not args.gpus:
            minutes = base_minutes(args, jobs.base_run, now - preparing, now - start)
            text, training_s = f" for {minutes} minutes", 60 * minutes
        print_step(f"2/6 training the base model{text} (log: {jobs.log('train-base')})")
        jobs.train_base(args.depth, minutes)
    print_step(f"3/6 preparing conversations (log: {jobs.log('prepare-sft')})")
    jobs.prepare_sft()
    minutes, text = None, ""
    if not args.gpus:
        minutes = sft_minutes(args, jobs.chat_run, training_s, time.monotonic() - start)
        text = f" for up to {minutes} minutes"
    print_step(f"4/6 fine-tuning to chat{text} (log: {jobs.log('train-sft')})")
    jobs.train_sft(minutes)
    jobs.forget_eval(jobs.chat_run)  # of other weights


def learn(args: Args, jobs: Jobs) -> str:
    """The fifth stage, reinforcement learning; returns the run to serve.

    It needs a model that is right now and then. If it fails, the fine-tuned model is served.
    """
    steps = args.rl_steps or 0
    run = jobs.rl_run(steps)
    if not steps:
        return jobs.chat_run
    if run_is_complete(args.storage, run):
        print_step(f"5/6 run {run} is trained already")
        return run
    print_step(f"5/6 learning from graded answers (log: {jobs.log('rl')})")
    if jobs.train_rl(steps):
        jobs.forget_eval(run)
        return run
    print_step(f"serving run {jobs.chat_run}, as it was fine-tuned")
    return jobs.chat_run


def serve(args: Args, jobs: Jobs, run: str, start: float) -> None:
    """The last stage: the endpoint, two questions and the evaluation."""
    from nanochat_ray.cli import chat

    if args.gpus:
        jobs.evaluate(run)  # before the endpoint takes the GPU's memory
    print_step(f"6/6 serving (log: {jobs.log('serve')})")
    jobs.serve(run, args.port)
    url = f"http://127.0.0.1:{args.port}"
    print_step("asking")
    for question in QUESTIONS:
        print(f"\n> {question}", flush=True)
        chat.main(chat.Args(url=url, once=question))
    print()
    if not args.gpus:
        jobs.evaluate(run)
    minutes, seconds = divmod(int(time.monotonic() - start), 60)
    print_step(f"done in {minutes}:{seconds:02d}; the chat page: {url}")
    print(
        f"OpenAI clients: base_url={url}/v1, model={jobs.chat_run}. "
        f"Stop all of it: nanochat-ray stop --port {args.port}",
        flush=True,
    )


def tag(args: Args) -> str:
    """Part of the runs' names: other text, another depth or other minutes are another run."""
    minutes = f"-{args.minutes:g}m" if args.minutes else ""
    text = f"-{zlib.crc32(text_state(args.text).encode())}" if args.text else ""
    return f"d{args.depth}{minutes}{text}"


def text_state(names: tuple[str, ...]) -> str:
    """What --text names now, with the files in folders, so that a new file is noticed."""
    from nanochat_ray.data import sources

    lines = []
    for name in names:
        lines.append(name)
        if "://" in name:
            continue
        try:
            files = sources.find([name])
        except (ValueError, OSError):  # the first stage reports it
            continue
        lines += [f"{file.uri} {file.size} {file.mtime_ns}" for file in files]
    return "\n".join(lines)


def run_is_complete(storage: str, run: str) -> bool:
    """Whether the run has reached its last step."""
    from nanochat_ray.checkpoint import checkpoint

    store = Store.at(storage).child("runs", run)
    name = checkpoint.latest(store)
    if name is None:
        return False
    trainer = checkpoint.load_trainer(store, name)
    return bool(trainer["step"] >= trainer["train_config"]["steps"])


def planned_minutes(storage: str, run: str) -> float:
    """Minutes that the plan of a run names which has begun; 0 if there is none."""
    from nanochat_ray.train.throughput import PLAN

    try:
        text = Store.at(storage).child("runs", run).read_text(PLAN)
        return float(json.loads(text)["plan"]["cpu_minutes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def base_minutes(args: Args, run: str, preparing_s: float, elapsed_s: float) -> float:
    """Minutes of base training on a CPU; a run that has begun keeps its plan."""
    rest_s = preparing_s * (REST + RL_REST * (args.rl_steps or 0) / RL_STEPS)
    left_s = PROMISE_S - elapsed_s - 60 * SFT_MINUTES - rest_s
    # A text of the user's may be of any size, so that preparing it says nothing of the rest.
    default = MOST_MINUTES if args.text else round(min(MOST_MINUTES, max(1.0, left_s / 60)), 1)
    return planned_minutes(args.storage, run) or args.minutes or default


def sft_minutes(args: Args, run: str, training_s: float, elapsed_s: float) -> float:
    """Minutes of fine-tuning on a CPU: those that are left; a run that has begun keeps its plan.

    ``training_s``: the part of ``elapsed_s`` that base training was planned for; 0 if it was
    complete before, so that nothing is known of this machine.
    """
    if minutes := planned_minutes(args.storage, run):
        return minutes
    if args.minutes is not None:
        return max(min(SFT_MINUTES, args.minutes), args.minutes / 2)
    if not training_s:
        return SFT_MINUTES
    rest_s = (elapsed_s - training_s) * (LATER + RL_LATER * (args.rl_steps or 0) / RL_STEPS)
    left_s = PROMISE_S - elapsed_s - max(0.0, rest_s)
    return round(min(MOST_SFT_MINUTES, max(SFT_MINUTES, left_s / 60)), 1)
