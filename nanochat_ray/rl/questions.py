"""Which questions are asked: a pure function of the seed and of what earlier steps observed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nanochat_ray.data.order import derive_key, permute
from nanochat_ray.tasks.task import Task
from nanochat_ray.text.chat import render_prompt
from nanochat_ray.text.tokenizer import Tokenizer

REWARD_DECAY = 0.8
"""Weight of the past in the running mean reward of a task."""
MIN_WEIGHT = 0.1
"""Weight of a task that is solved, so that it is not forgotten."""


@dataclass(frozen=True)
class Question:
    """Example ``index`` of task number ``task``."""

    task: int
    index: int


def content_digest(tasks: Sequence[Task]) -> str:
    """SHA-256 (hex) of all questions of the tasks with their ideal answers."""
    sha = hashlib.sha256()
    for task in tasks:
        for index in range(len(task)):
            sha.update(json.dumps(task.example(index), sort_keys=True).encode() + b"\n")
        sha.update(b"\n")
    return sha.hexdigest()


def prompts(tasks: Sequence[Task], tokenizer: Tokenizer) -> list[list[list[int]]]:
    """Token ids of each question of each task."""
    return [
        [render_prompt(tokenizer, task.question(index)) for index in range(len(task))]
        for task in tasks
    ]


class Curriculum:
    """Chooses the next questions; ``observe`` tells it their rewards.

    Each task walks through a permutation of its questions, and another one when it begins again.
    Tasks take turns in proportion to their weights (smooth weighted round robin): 1 minus the
    running mean reward, so that effort goes where answers are wrong.
    """

    def __init__(self, sizes: Sequence[int], seed: int, *, adaptive: bool):
        """``sizes``: the number of questions of each task. Without ``adaptive`` all tasks have
        equal weights."""
        self.sizes, self.seed, self.adaptive = list(sizes), seed, adaptive
        self.asked_counts = [0] * len(sizes)
        self.rewards = [0.0] * len(sizes)
        """Running mean reward."""
        self._credits = [0.0] * len(sizes)

    def weights(self) -> list[float]:
        if not self.adaptive:
            return [1.0] * len(self.sizes)
        return [max(MIN_WEIGHT, 1 - reward) for reward in self.rewards]

    def draw(self, count: int) -> list[Question]:
        weights, questions = self.weights(), []
        for _ in range(count):
            self._credits = [c + w for c, w in zip(self._credits, weights, strict=True)]
            task = max(range(len(weights)), key=lambda i: self._credits[i])
            self._credits[task] -= sum(weights)
            questions.append(Question(task, self._next_index(task)))
        return questions

    def _next_index(self, task: int) -> int:
        epoch, position = divmod(self.asked_counts[task], self.sizes[task])
        self.asked_counts[task] += 1
        key = derive_key(self.seed, task, epoch)
        return int(permute(np.array([position]), self.sizes[task], key)[0])

    def observe(self, questions: Sequence[Question], rewards: Sequence[float]) -> None:
        """The mean rewards of the groups of ``questions``."""
        for task in range(len(self.sizes)):
            own = [r for q, r in zip(questions, rewards, strict=True) if q.task == task]
            if own:
                mean = sum(own) / len(own)
                self.rewards[task] += (1 - REWARD_DECAY) * (mean - self.rewards[task])

    def state(self) -> dict[str, Any]:
        return {
            "asked_counts": list(self.asked_counts),
            "rewards": list(self.rewards),
            "credits": list(self._credits),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.asked_counts = [int(n) for n in state["asked_counts"]]
        self.rewards = [float(x) for x in state["rewards"]]
        self._credits = [float(x) for x in state["credits"]]
