"""Measure what users of an endpoint see while its replicas also sample rollouts.

    nanochat-ray serve --run chat
    RAY_ADDRESS=auto nanochat-ray bench shared-fleet --run chat

Phases with and without rollouts alternate, each a closed loop of streams over HTTP. Rollouts are
those of ``nanochat-ray rl --endpoint``, with new weights for each round, but nothing is trained: a
trainer would be on another machine. The last line is one JSON object.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from nanochat_ray.bench import load
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import check_int
from nanochat_ray.cli import rl
from nanochat_ray.engine.request import Request
from nanochat_ray.evals.answers import make_requests
from nanochat_ray.on_ray import session
from nanochat_ray.on_ray.fleet import Fleet, endpoint_engines
from nanochat_ray.on_ray.rl import engine_spec
from nanochat_ray.rl.questions import Question, QuestionSet
from nanochat_ray.rl.rollout import sampling_params
from nanochat_ray.storage import Store, default_root

VOCAB = 256
FIGURES = ("ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms", "tokens_per_s")


@dataclass(frozen=True, kw_only=True)
class Args:
    url: str = "http://127.0.0.1:8000"
    """Endpoint."""
    key: str = ""
    """API key."""
    endpoint: str = "nanochat"
    """Its Serve application, on the cluster of RAY_ADDRESS."""
    storage: str = field(default_factory=default_root)
    run: str = "chat"
    """Run whose model samples the rollouts."""
    streams: int = 8
    """Answers of users at a time."""
    requests: int = 200
    """Requests of users in each phase."""
    prompt: int = 64
    """Tokens of a prompt, give or take a half."""
    output: int = 48
    """Tokens of an answer, give or take a half."""
    questions: int = 8
    samples: int = 8
    """Answers to each question of a round of rollouts, which has weights of its own."""
    repeats: int = 3
    """Phases of each kind."""

    def __post_init__(self) -> None:
        for name in ("streams", "requests", "prompt", "output", "questions", "samples", "repeats"):
            check_int(name, getattr(self, name), 1)


class Sampling:
    """Rollouts in a thread, one round after the other, until the block ends. The end of the block
    raises what a round has raised."""

    def __init__(self, sample: Callable[[], int]):
        """``sample`` samples a round and returns its tokens."""
        self._sample = sample
        self._stop = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self.num_rounds = self.num_tokens = 0
        self.seconds = 0.0

    def _run(self) -> None:
        start = time.monotonic()
        while not self._stop.is_set():
            self.num_tokens += self._sample()
            self.num_rounds += 1
            self.seconds = time.monotonic() - start

    def __enter__(self) -> Sampling:
        self._future = self._thread.submit(self._run)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._stop.set()
        self._thread.shutdown()
        if error is None:
            self._future.result()
        elif failure := self._future.exception():
            error.add_note(f"Sampling has failed too: {failure!r}")


def rollouts(args: Args) -> Callable[[], int]:
    """Samples one round on the endpoint, each with weights that are new to it, and returns its
    tokens."""
    flags = rl.Args(
        storage=args.storage, parent=args.run, run="shared-fleet", endpoint=args.endpoint
    )
    config = rl.build(flags)
    model, tokenizer = checkpoint.load_model(Store.at(args.storage).child("runs", args.run))
    rl_config = flags.rl_config()
    questions = QuestionSet(rl_config.tasks, "train", args.questions, 0, tokenizer)
    params = sampling_params(rl_config, tokenizer)
    requests: list[Request] = []
    for number in range(args.questions):
        index, task = divmod(number, len(questions.tasks))
        prompt = questions.prompt(Question(task, index))
        requests += make_requests(prompt, range(args.samples), params, str(number))
    spec = engine_spec(config, rl.engine_config(flags))
    fleet = Fleet(endpoint_engines(args.endpoint), spec)
    versions = itertools.count(1)

    def sample() -> int:
        fleet.load(next(versions), model.state_dict())
        return sum(len(output.tokens) for output in fleet.run(requests))

    return sample


def users(args: Args, model: str, seed: int) -> dict[str, Any]:
    """Figures of one phase (``load.summary``)."""
    prompts = load.random_prompts(
        args.requests, vocab=VOCAB, prompt=args.prompt, output=args.output, spread=0.5, seed=seed
    )
    run = load.drive(args.url, model, prompts, concurrency=args.streams, key=args.key)
    results, seconds = asyncio.run(run)
    if errors := [result.error for result in results if result.error]:
        raise ValueError(f"{args.url}: {len(errors)} requests failed, the first: {errors[0]}")
    return load.summary(results, seconds)


def medians(phases: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {name: load.percentile([phase[name] for phase in phases], 0.5) for name in FIGURES}


def table(alone: dict[str, float], beside: dict[str, float]) -> str:
    """A line for each figure, with the ratio: none to 0, which is the time between tokens that
    arrive together."""
    lines = []
    for name in FIGURES:
        ratio = f"{beside[name] / alone[name]:.2f}" if alone[name] else "-"
        lines.append(
            f"{name:<14} alone {alone[name]:9.1f}   beside rollouts {beside[name]:9.1f}   {ratio}"
        )
    return "\n".join(lines)


def main(args: Args) -> None:
    session.connect()
    model, sample = load.model_at(args.url, args.key), rollouts(args)
    sample()  # the replicas start their second engine
    users(args, model, seed=0)
    phases: dict[str, list[dict[str, Any]]] = {"alone": [], "beside rollouts": []}
    rates = []
    for seed in range(1, args.repeats + 1):
        phases["alone"].append(users(args, model, seed))
        with Sampling(sample) as sampling:
            phases["beside rollouts"].append(users(args, model, seed))
        rates.append(sampling.num_tokens / sampling.seconds)
    figures: dict[str, Any] = {name: medians(each) for name, each in phases.items()}
    alone, beside = figures["alone"], figures["beside rollouts"]
    print(table(alone, beside))
    figures["rollout_tokens_per_s"] = load.percentile(rates, 0.5)
    figures["ttft_p99_ratio"] = beside["ttft_p99_ms"] / alone["ttft_p99_ms"]
    print(json.dumps(figures))
