"""From raw text to a chat answer over HTTP, on Ray, with one command.

    nanochat-ray quickstart
    nanochat-ray quickstart --text my/books/ more/*.jsonl.gz
    nanochat-ray quickstart --gpus 8 --depth 20

Run again, it continues: no stage that is complete runs twice. Ctrl-C, or nanochat-ray stop, ends
what it started and nothing else.
"""

from __future__ import annotations

import os
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
from nanochat_ray.cli import quickstart_plan as plan
from nanochat_ray.cli.quickstart_jobs import Jobs
from nanochat_ray.on_ray.local_cluster import LocalCluster, print_step
from nanochat_ray.storage import Store, absolute, default_root

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
    """CPU: minutes of base training. Fine-tuning takes half as long: at least 2 minutes, or as long
    as base training if that is less; 2 passes at most. By default each stage is planned when it
    begins, so that all takes about 12 minutes, behind the preparation of --text."""
    rl_steps: int | None = None
    """Steps of learning from graded answers; 0: none. By default 20 to 60, as time is left; 50 with
    --minutes, and on GPUs 0."""
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
        if self.rl_steps is None and (self.gpus or self.minutes is not None):
            object.__setattr__(self, "rl_steps", 0 if self.gpus else plan.RL_STEPS)
        elif self.rl_steps is not None:
            check_int("rl_steps", self.rl_steps, 0, 1 << 30)
            require(not (self.gpus and self.rl_steps), "rl_steps", self.rl_steps, "0 with --gpus")
        if self.minutes is not None:
            check_float("minutes", self.minutes, above=True)
            require(not self.gpus, "--minutes", self.minutes, "only on a CPU, not with --gpus")
        require(not (self.stay and self.leave), "--stay", True, "not with --leave")


def _absolute(name: str) -> str:
    """A path that does not depend on a job's working directory; URIs stay as they are."""
    return name if "://" in name else str(Path(os.path.expanduser(name)).absolute())


def main(args: Args) -> None:
    signal.signal(signal.SIGTERM, _on_term)
    start = time.monotonic()
    cluster = LocalCluster(args.port)
    cluster.logs.mkdir(parents=True, exist_ok=True)
    with _cluster_for(cluster, args.gpus):
        jobs = Jobs(cluster, args.storage, tag(args), gpus=args.gpus)
        clock = start
        if run_is_complete(args.storage, jobs.chat_run):
            print_step(f"1–4/6 run {jobs.chat_run} is trained already")
        else:
            clock = train(args, jobs, start)
        serve(args, jobs, learn(args, jobs, clock), start)
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


def train(args: Args, jobs: Jobs, clock: float) -> float:
    """The first four stages: both datasets and both runs.

    Returns from when on the plan counts the time, ``clock`` or later: a text of the user's may take
    any time to prepare.
    """
    if not run_is_complete(args.storage, jobs.base_run):
        print_step(f"1/6 preparing the text (log: {jobs.log('prepare-base')})")
        jobs.prepare_base(args.text or ())
        if args.text:
            clock = time.monotonic()
        minutes, text = base_minutes(args, jobs.base_run, clock)
        print_step(f"2/6 training the base model{text} (log: {jobs.log('train-base')})")
        jobs.train_base(args.depth, minutes)
    print_step(f"3/6 preparing conversations (log: {jobs.log('prepare-sft')})")
    jobs.prepare_sft()
    minutes, epochs, text = sft_length(args, jobs, clock)
    print_step(f"4/6 fine-tuning to chat{text} (log: {jobs.log('train-sft')})")
    jobs.train_sft(minutes, epochs)
    jobs.forget_eval(jobs.chat_run)  # of other weights
    return clock


def base_minutes(args: Args, run: str, clock: float) -> tuple[float | None, str]:
    """Minutes of base training on a CPU, and how the step says so."""
    if args.gpus:
        return None, ""
    if args.minutes is not None:
        return args.minutes, f" for {args.minutes} minutes"
    progress = plan.measure(clock)
    fresh = plan.base_minutes(progress, args.rl_steps)
    minutes, remark = plan.settle(_run(args, run), fresh, fresh, progress)
    rest = f"then {plan.EPOCHS} passes to chat and up to {_rl_steps(args)} steps of RL"
    return minutes, f" for {minutes} minutes{remark}, {rest}"


def sft_length(args: Args, jobs: Jobs, clock: float) -> tuple[float | None, float | None, str]:
    """Minutes and passes of fine-tuning on a CPU, at most, and how the step says so."""
    if args.gpus:
        return None, None, ""
    if args.minutes is not None:
        minutes = max(min(plan.SFT_MINUTES, args.minutes), args.minutes / 2)
        return minutes, plan.MOST_EPOCHS, f" for up to {minutes} minutes"
    progress = plan.measure(clock, _run(args, jobs.base_run))
    fresh = plan.sft_epochs(progress, args.rl_steps)
    epochs, remark = plan.settle(_run(args, jobs.chat_run), fresh, plan.EPOCHS, progress)
    return plan.sft_minutes(progress, epochs), epochs, f" in {epochs} passes{remark}"


def _run(args: Args, name: str) -> Store:
    return Store.at(args.storage).child("runs", name)


def _rl_steps(args: Args) -> int:
    """Before the last training has ended."""
    return plan.RL_STEPS if args.rl_steps is None else args.rl_steps


def learn(args: Args, jobs: Jobs, clock: float) -> str:
    """The fifth stage, reinforcement learning; returns the run to serve.

    It needs a model that is right now and then. If it fails, the fine-tuned model is served.
    """
    if args.rl_steps == 0:
        return jobs.chat_run
    run, remark = jobs.rl_run(args.rl_steps), ""
    if run_is_complete(args.storage, run):
        print_step(f"5/6 run {run} is trained already")
        return run
    steps = _rl_steps(args)
    if args.rl_steps is None:
        progress = plan.measure(clock, _run(args, jobs.base_run), _run(args, jobs.chat_run))
        fresh = plan.rl_steps(progress)
        steps, remark = plan.settle(_run(args, run), fresh, steps, progress)
    print_step(f"5/6 learning from graded answers in {steps} steps{remark} (log: {jobs.log('rl')})")
    if jobs.train_rl(run, steps):
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
