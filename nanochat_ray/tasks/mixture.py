"""A mixture of conversations to fine-tune on: tasks by name and count, and a user's own files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_ray.data.shards import Split
from nanochat_ray.tasks import conversations
from nanochat_ray.tasks.conversations import Conversations, Entry
from nanochat_ray.tasks.registry import make_task
from nanochat_ray.text.chat import Message


@dataclass(frozen=True)
class Mixture:
    """Implements ``data.render_conversations.Mixture``."""

    tasks: tuple[tuple[str, int], ...]
    """(name, conversations to train on)."""
    chats: tuple[Conversations, ...]
    seed: int

    @classmethod
    def load(cls, tasks: Sequence[tuple[str, int]], chats: Sequence[Entry], seed: int) -> Mixture:
        """Reads the files of ``chats``. Raises ValueError, naming the file, if one is damaged."""
        return cls(tuple(tasks), tuple(conversations.load(chats, seed)), seed)

    def identity(self) -> tuple[list[tuple[str, int]], list[str]]:
        digests = [conversations.digest(self.chats)] if self.chats else []
        return list(self.tasks), digests

    def counts(self) -> list[tuple[str, int]]:
        return [*self.tasks, *((chats.name, len(chats.train)) for chats in self.chats)]

    def sizes(self, split: Split) -> list[tuple[str, int]]:
        """ValueError for an unknown task."""
        sizes = []
        for name, count in self.tasks:
            size = count if split == "train" else max(8, min(200, count // 20))
            sizes.append((name, len(make_task(name, split, size=size, seed=self.seed))))
        return sizes + [(chats.name, len(chats.split(split))) for chats in self.chats]

    def conversations(
        self, source: str, split: Split, size: int, start: int, stop: int
    ) -> list[list[Message]]:
        for chats in self.chats:
            if chats.name == source:
                return chats.split(split)[start:stop]
        task = make_task(source, split, size=size, seed=self.seed)
        return [task.example(i) for i in range(start, stop)]
