"""Rollouts: sampled answers, each a pure function of (weights, seed, question, sample); and their
rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np

from nanochat_ray.engine.offline import OfflineEngine
from nanochat_ray.engine.request import Finish, Request, RequestOutput, SamplingParams
from nanochat_ray.evals.answers import answer_params, answer_text, make_requests
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.questions import Question, QuestionSet
from nanochat_ray.tasks.task import Task, grade_answer, map_in_threads
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train.ranks import Ranks


class Rollout(NamedTuple):
    """One answer, of JSON values. ``logprobs[i]`` is that of ``tokens[i]`` when it was sampled, or
    None if a tool injected the token."""

    tokens: list[int]
    logprobs: list[float | None]
    finish: Finish
    version: int
    """Of the weights that sampled it."""

    @classmethod
    def of(cls, output: RequestOutput) -> Self:
        """``output``: all of a request, by an engine that has loaded a version."""
        assert output.finish is not None
        logprobs = [None if entry is None else entry.logprob for entry in output.logprobs or ()]
        return cls(output.tokens, logprobs, output.finish, int(output.weight_version))

    @property
    def is_truncated(self) -> bool:
        return self.finish == "length"


class Group(NamedTuple):
    """The answers to one question, of JSON values, each with its reward."""

    question: Question
    prompt: list[int]
    rollouts: list[Rollout]
    rewards: list[float]

    @classmethod
    def from_json(cls, values: Sequence[Any]) -> Self:
        question, prompt, rollouts, rewards = values
        return cls(Question(*question), prompt, [Rollout(*r) for r in rollouts], rewards)

    @property
    def reward(self) -> float:
        """The mean."""
        return float(np.mean(self.rewards))

    @property
    def has_signal(self) -> bool:
        return min(self.rewards) < max(self.rewards)


def rollout_seed(*key: int) -> int:
    """64 bits for numbers such as (seed, step, task, question, sample)."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little")


def sample_rollouts(engine: OfflineEngine, requests: Sequence[Request]) -> list[Rollout]:
    """The rollout of each request, in their order."""
    by_id = {output.request_id: output for output in engine.run(requests)}
    return [Rollout.of(by_id[request.id]) for request in requests]


def sampling_params(rl: RLConfig, tokenizer: Tokenizer) -> SamplingParams:
    """Of answers to train on: with the log-probabilities of the distribution that is sampled."""
    return answer_params(
        tokenizer,
        temperature=rl.temperature,
        max_tokens=rl.max_tokens,
        logprobs=0,
        logprobs_mode="processed_logprobs",
    )


class GroupSampler:
    """Samples a group of answers to each question, with the weights that ``engine`` has loaded."""

    def __init__(
        self, rl: RLConfig, tokenizer: Tokenizer, engine: OfflineEngine, ranks: Ranks, seed: int
    ):
        self.rl, self.tokenizer, self.engine = rl, tokenizer, engine
        self.ranks, self.seed = ranks, seed
        self.params = sampling_params(rl, tokenizer)

    def sample(
        self,
        question_set: QuestionSet,
        questions: Sequence[Question],
        *,
        samples: int,
        step: int,
        first: int = 0,
    ) -> list[Group]:
        """A group of ``samples`` answers to each question, on all ranks. Collective: each samples
        and grades its share, so that a grade that is given twice with another result is one.

        ``first`` is the number of the first question within the step.
        """
        requests, own = [], range(self.ranks.rank, len(questions), self.ranks.world)
        for number in own:
            key = (self.seed, step, first + number, *questions[number])
            seeds = [rollout_seed(*key, sample) for sample in range(samples)]
            prompt = question_set.prompt(questions[number])
            requests += make_requests(prompt, seeds, self.params, str(number))
        rollouts = sample_rollouts(self.engine, requests)
        answers = [rollouts[i : i + samples] for i in range(0, len(rollouts), samples)]

        def grade(number: int, group: Sequence[Rollout]) -> list[float]:
            question = questions[number]
            return self.grade(question_set.tasks[question.task], question.example, group)

        num_threads = self.rl.grade_threads
        rewards = self.ranks.run_together(lambda: map_in_threads(num_threads, grade, own, answers))
        data = json.dumps(list(zip(answers, rewards, strict=True))).encode()
        shares = [json.loads(share) for share in self.ranks.gather(data)]
        groups = []
        for number, question in enumerate(questions):
            share = shares[number % self.ranks.world]
            group = [question, question_set.prompt(question), *share[number // self.ranks.world]]
            groups.append(Group.from_json(group))
        return groups

    def grade(self, task: Task, index: int, rollouts: Sequence[Rollout]) -> list[float]:
        """The reward of each rollout; equal ones are graded once."""
        rewards: dict[tuple[int, ...], float] = {}
        for rollout in rollouts:
            key = tuple(rollout.tokens)
            if rollout.is_truncated and self.rl.truncation == "wrong":
                rewards[key] = 0.0
            elif key not in rewards:
                text = answer_text(self.tokenizer, rollout.tokens)
                rewards[key] = grade_answer(task, index, text)
        return [rewards[tuple(rollout.tokens)] for rollout in rollouts]
