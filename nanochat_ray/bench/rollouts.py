"""Measure rollouts: this engine beside nanochat's, as its ``scripts/chat_rl.py`` samples.

    nanochat-ray bench rollouts --run chat --nanochat ../nanochat

Both have the weights of the run, in float32, and the same questions. nanochat's engine takes one
question at a time and ``batch`` answers at once (its script's default is 8), which run until the
longest of them ends; this one takes all answers of a step. Rounds alternate; figures are medians.
The greedy answers of both are compared first. The last line is one JSON object.
"""

from __future__ import annotations

import importlib
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from nanochat_ray.bench import nanochat_checkout
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import check_int, require
from nanochat_ray.cli import rl
from nanochat_ray.engine.offline import LocalEngine
from nanochat_ray.engine.request import SamplingParams
from nanochat_ray.evals.answers import make_requests
from nanochat_ray.model.gpt import GPT
from nanochat_ray.rl.config import DEFAULT_TASKS, RLConfig
from nanochat_ray.rl.rollout import Rollout, rollout_seed, sample_rollouts, sampling_params
from nanochat_ray.storage import Store, default_root
from nanochat_ray.tasks.registry import make_task
from nanochat_ray.text.chat import render_prompt
from nanochat_ray.text.tokenizer import Tokenizer

GREEDY_TOKENS = 32
Sample = Callable[[int], list[list[int]]]
"""(seed) → the tokens of each answer."""


@dataclass(frozen=True, kw_only=True)
class Args:
    nanochat: Path
    """Checkout of nanochat."""
    storage: str = field(default_factory=default_root)
    run: str = "chat"
    """Run whose model samples."""
    tasks: tuple[str, ...] = DEFAULT_TASKS
    """Tasks whose questions are asked, in turns."""
    questions: int = RLConfig.questions
    samples: int = RLConfig.samples
    """Answers to each question."""
    batch: int = 8
    """Answers that nanochat's engine samples at once."""
    max_tokens: int = RLConfig.max_tokens
    repeats: int = 5
    threads: int = 1

    def __post_init__(self) -> None:
        self.rl_args()
        for name in ("batch", "repeats", "threads"):
            check_int(name, getattr(self, name), 1)
        require(not self.samples % self.batch, "batch", self.batch, "a divisor of --samples")

    def rl_args(self) -> rl.Args:
        """Those of ``nanochat-ray rl`` that samples so."""
        names = ("questions", "samples", "max_tokens")
        flags = {name: getattr(self, name) for name in names}
        run = f"{self.run}-rollouts"
        return rl.Args(
            storage=self.storage, parent=self.run, run=run, tasks=self.tasks, rl=flags, ray=False
        )


class NanochatTokenizer:
    """What nanochat's engine asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.encode, self.decode = tokenizer.encode, tokenizer.decode
        self.encode_special = tokenizer.special
        self.get_bos_token_id = lambda: tokenizer.bos


def nanochat_engine(checkout: Path, model: GPT, tokenizer: Tokenizer) -> Any:
    """Its engine with our weights."""
    peer = nanochat_checkout.model_of(str(checkout), model)
    engine = importlib.import_module("nanochat.engine")
    return engine.Engine(peer, NanochatTokenizer(tokenizer))


def make_engine(model: GPT, tokenizer: Tokenizer, args: Args) -> LocalEngine:
    """That of ``nanochat-ray rl``."""
    engine = LocalEngine.from_model(model, tokenizer, rl.engine_config(args.rl_args()))
    engine.load(0, model.state_dict())
    return engine


def ours(
    engine: LocalEngine, params: SamplingParams, prompts: list[list[int]], args: Args
) -> Sample:
    """With the log-probabilities that training needs; nanochat's script has none."""

    def sample(seed: int) -> list[list[int]]:
        requests = []
        for number, prompt in enumerate(prompts):
            seeds = [rollout_seed(seed, number, i) for i in range(args.samples)]
            requests += make_requests(prompt, seeds, params, str(number))
        return [answer_of(rollout) for rollout in sample_rollouts(engine, requests)]

    return sample


def answer_of(rollout: Rollout) -> list[int]:
    """Without the token that ends it, as nanochat returns answers."""
    return rollout.tokens[:-1] if rollout.finish == "stop" else rollout.tokens


def theirs(engine: Any, prompts: list[list[int]], args: Args) -> Sample:
    def sample(seed: int) -> list[list[int]]:
        answers: list[list[int]] = []
        for number, prompt in enumerate(prompts):
            for first in range(0, args.samples, args.batch):
                sequences, _ = engine.generate_batch(
                    prompt,
                    num_samples=args.batch,
                    max_tokens=args.max_tokens,
                    temperature=1.0,
                    top_k=50,
                    seed=rollout_seed(seed, number, first) & 0x7FFFFFFF,
                )
                answers += [sequence[len(prompt) :] for sequence in sequences]
        return answers

    return sample


def equal_greedy_answers(
    engine: LocalEngine, peer: Any, params: SamplingParams, prompts: list[list[int]]
) -> float:
    """The share of prompts whose greedy answers are equal, token for token."""
    params = replace(params, temperature=0.0, max_tokens=GREEDY_TOKENS)
    equal = 0
    for number, prompt in enumerate(prompts):
        (rollout,) = sample_rollouts(engine, make_requests(prompt, [0], params, str(number)))
        sequences, _ = peer.generate_batch(
            prompt, num_samples=1, max_tokens=GREEDY_TOKENS, temperature=0.0
        )
        equal += answer_of(rollout) == sequences[0][len(prompt) :]
    return equal / len(prompts)


def measure(systems: dict[str, Sample], repeats: int) -> dict[str, dict[str, float]]:
    """Medians of each system, one round of which warms up."""
    rounds: dict[str, list[tuple[float, float, int]]] = {name: [] for name in systems}
    for seed in range(repeats + 1):
        for name, sample in systems.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            answers = sample(seed)
            seconds, cpu = time.perf_counter() - start, time.process_time() - cpu_start
            if seed:
                rounds[name].append((seconds, cpu, sum(map(len, answers))))
    return {
        name: {
            "seconds": statistics.median(seconds for seconds, _, _ in each),
            "cpu_seconds": statistics.median(cpu for _, cpu, _ in each),
            "tokens_per_s": statistics.median(tokens / seconds for seconds, _, tokens in each),
            "answer_tokens": statistics.mean(tokens for _, _, tokens in each),
        }
        for name, each in rounds.items()
    }


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    model, tokenizer = checkpoint.load_model(Store.at(args.storage).child("runs", args.run))
    tasks = [make_task(name, "train", size=args.questions, seed=0) for name in args.tasks]
    questions = [tasks[i % len(tasks)].question(i // len(tasks)) for i in range(args.questions)]
    prompts = [render_prompt(tokenizer, question) for question in questions]
    peer = nanochat_engine(args.nanochat, model, tokenizer)
    engine = make_engine(model, tokenizer, args)
    params = sampling_params(args.rl_args().rl_config(), tokenizer)
    equal = equal_greedy_answers(engine, peer, params, prompts)
    print(f"equal greedy answers: {equal:.0%} of {len(prompts)}", flush=True)
    systems = {"nanochat_ray": ours(engine, params, prompts, args)}
    for batch in (args.batch, args.samples):
        name = f"nanochat, {batch} at once"
        systems[name] = theirs(peer, prompts, replace(args, batch=batch))
    figures = measure(systems, args.repeats)
    own = figures["nanochat_ray"]["tokens_per_s"]
    for name, each in figures.items():
        each["times_slower"] = own / each["tokens_per_s"]
        print(
            f"{name:<24} {each['seconds']:7.2f} s ({each['cpu_seconds']:.2f} s of processor time) "
            f"{each['tokens_per_s']:8.0f} tokens/s, "
            f"{each['times_slower']:.2f} times slower than nanochat_ray"
        )
    print(json.dumps({"equal_greedy_answers": equal, "systems": figures}))
