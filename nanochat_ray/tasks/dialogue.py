"""Conversations of several turns, each turn from another task, as people talk on a chat page."""

from __future__ import annotations

import random

from nanochat_ray.tasks.identity import Identity
from nanochat_ray.tasks.limits import Limits
from nanochat_ray.tasks.spoken import FollowUps, SpokenArithmetic, SpokenLegs, sent_back
from nanochat_ray.tasks.task import DEFAULT_SIZE, Split, Task
from nanochat_ray.text.chat import Message


class Dialogue:
    """Two to four examples of other tasks, one after the other; the last one is graded. In every
    second dialogue the calculated answers before it are as clients send them back."""

    name = "dialogue"

    def __init__(self, split: Split, size: int | None, seed: int):
        self._size = size or DEFAULT_SIZE
        self._split, self._seed = split, seed
        # Seeds of their own: else these questions would also be those of the tasks by themselves.
        self._tasks: list[Task] = [
            Identity(split, self._size, seed + 11),
            Limits(split, self._size, seed + 12),
            SpokenArithmetic("chain_sum", split, self._size, seed + 13),
            SpokenLegs(split, self._size, seed + 14),
            SpokenArithmetic("products", split, self._size, seed + 15),
            FollowUps(split, self._size, seed + 16),
        ]

    def __len__(self) -> int:
        return min(self._size, *map(len, self._tasks))

    def _parts(self, index: int) -> list[tuple[Task, int]]:
        rng = random.Random(f"{self._seed}/{self._split}/dialogue/{index}")
        count = rng.choice((2, 2, 3, 4))
        return [(rng.choice(self._tasks), rng.randrange(len(self))) for _ in range(count)]

    def question(self, index: int) -> list[Message]:
        return self.example(index)[:-1]

    def example(self, index: int) -> list[Message]:
        *before, last = [m for task, i in self._parts(index) for m in task.example(i)]
        if index % 2:
            before = [m if isinstance(m["content"], str) else sent_back(m) for m in before]
        return [*before, last]

    def grade(self, index: int, answer: str) -> bool | float:
        task, last = self._parts(index)[-1]
        return task.grade(last, answer)
