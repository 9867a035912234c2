"""The ``Task`` protocol: questions with ideal answers, and a program that grades answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

from nanochat_ray.text.chat import Message

Split = Literal["train", "val", "test"]


class Task(Protocol):
    """Examples by index; equal arguments give equal examples in every process.

    The splits of a task never share a question.
    """

    name: str

    def __len__(self) -> int: ...

    def question(self, index: int) -> list[Message]:
        """The conversation up to the assistant's answer."""
        ...

    def example(self, index: int) -> list[Message]:
        """The question with its ideal answer, which fine-tuning trains on."""
        ...

    def grade(self, index: int, answer: str) -> bool:
        """Whether ``answer``, the text of the assistant, is right."""
        ...


def content_digest(tasks: Sequence[Task]) -> str:
    """SHA-256 (hex) of all questions of the tasks with their ideal answers."""
    sha = hashlib.sha256()
    for task in tasks:
        for index in range(len(task)):
            sha.update(json.dumps(task.example(index), sort_keys=True).encode() + b"\n")
        sha.update(b"\n")
    return sha.hexdigest()


TaskFactory = Callable[..., Task]
"""(split, at most how many examples, seed, and options by keyword) → task. None is all, or
``DEFAULT_SIZE`` of a task that generates its examples."""
DEFAULT_SIZE = 1000
MAX_ANSWER_TOKENS = 128
"""Where an evaluation cuts an answer, by default."""


def calculator_turn(expression: str, result: str, text: str) -> list[Message]:
    """Content of an assistant that calls the calculator and then writes ``text``."""
    return [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": result},
        {"type": "text", "text": text},
    ]
