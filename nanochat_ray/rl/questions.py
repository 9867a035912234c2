"""Which questions are asked: a pure function of the seed and of what earlier steps observed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from nanochat_ray.data.order import derive_key, permute
from nanochat_ray.evals.answers import task_prompts
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.tasks.registry import make_tasks
from nanochat_ray.tasks.task import Split
from nanochat_ray.text.tokenizer import Tokenizer

REWARD_DECAY = 0.8
"""Weight of the past in the running mean reward of a task."""
MIN_WEIGHT = 0.1
"""Weight of a task that is solved, so that it is not forgotten."""


class Question(NamedTuple):
    """An ``example`` of a ``task``, both by their numbers."""

    task: int
    example: int


class QuestionSet:
    """The tasks of a split, with the token ids of each question's prompt."""

    def __init__(
        self, names: Sequence[str], split: Split, size: int, seed: int, tokenizer: Tokenizer
    ):
        self.tasks = make_tasks(names, split, size, seed)
        self._prompts = [task_prompts(task, tokenizer) for task in self.tasks]

    def prompt(self, question: Question) -> list[int]:
        return self._prompts[question.task][question.example]

    @property
    def sizes(self) -> list[int]:
        return [len(task) for task in self.tasks]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(prompt) for prompts in self._prompts for prompt in prompts)

    def every_question(self) -> list[Question]:
        return [Question(task, i) for task, size in enumerate(self.sizes) for i in range(size)]


def questions_needed(config: RLConfig, num_groups: int, num_with_signal: int) -> int:
    """Questions of the next round: as many as will give the missing groups with signal, if as many
    of them have it as of those so far."""
    missing = config.min_groups - num_with_signal
    if not num_groups or missing <= 0:
        return 0 if num_groups else config.questions
    share = max(1, num_with_signal) / num_groups
    return min(config.questions, math.ceil(missing / share))


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
        self.rewards = np.zeros(len(sizes))
        """Running mean reward."""
        self._credits = np.zeros(len(sizes))

    def weights(self) -> np.ndarray:
        """float64 ``[tasks]``"""
        if not self.adaptive:
            return np.ones(len(self.sizes))
        return np.maximum(MIN_WEIGHT, 1 - self.rewards)

    def draw(self, count: int) -> list[Question]:
        weights, questions = self.weights(), []
        for _ in range(count):
            self._credits += weights
            task = int(self._credits.argmax())
            self._credits[task] -= math.fsum(weights)
            questions.append(Question(task, self._next_index(task)))
        return questions

    def _next_index(self, task: int) -> int:
        epoch, position = divmod(self.asked_counts[task], self.sizes[task])
        self.asked_counts[task] += 1
        key = derive_key(self.seed, task, epoch)
        return int(permute(np.array([position]), self.sizes[task], key)[0])

    def observe(self, questions: Sequence[Question], rewards: Sequence[float]) -> None:
        """The mean rewards of the groups of ``questions``."""
        tasks, values = np.array([q.task for q in questions]), np.array(rewards)
        for task in np.unique(tasks):
            mean = values[tasks == task].mean()
            self.rewards[task] += (1 - REWARD_DECAY) * (mean - self.rewards[task])

    def state(self) -> dict[str, Any]:
        return {
            "asked_counts": list(self.asked_counts),
            "rewards": self.rewards.tolist(),
            "credits": self._credits.tolist(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.asked_counts = [int(n) for n in state["asked_counts"]]
        self.rewards, self._credits = np.array(state["rewards"]), np.array(state["credits"])
