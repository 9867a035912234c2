"""The ``Task`` protocol: questions with ideal answers, and a program that grades answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from nanochat_ray.text.chat import Message

T = TypeVar("T")
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

    def grade(self, index: int, answer: str) -> bool | float:
        """Whether ``answer``, the text of the assistant, is right; or a finite number, 1 for an
        answer that is right in all."""
        ...


def content_digest(tasks: Sequence[Task]) -> str:
    """SHA-256 (hex) of all questions of the tasks with their ideal answers."""
    sha = hashlib.sha256()
    for task in tasks:
        for index in range(len(task)):
            sha.update(json.dumps(task.example(index), sort_keys=True).encode() + b"\n")
        sha.update(b"\n")
    return sha.hexdigest()


def grade_answer(task: Task, index: int, answer: str) -> float:
    """The task's grade. ValueError if it is no finite number; a note on what it raises."""
    try:
        grade = task.grade(index, answer)
    except Exception as error:
        error.add_note(f"raised by task={task.name!r} as it graded {answer!r} to question {index}")
        raise
    is_number = isinstance(grade, bool | int | float | np.number | np.bool_)
    if not is_number or not np.isfinite(grade):
        raise ValueError(
            f"task={task.name!r} graded {answer!r} to question {index} with {grade!r}: a bool or "
            "a finite number is expected"
        )
    return float(grade)


def map_in_threads(num_threads: int, function: Callable[..., T], *items: Iterable[Any]) -> list[T]:
    """``map``; one thread is the caller's, as a grader with ``signal.alarm`` needs the main one."""
    if num_threads == 1:
        return list(map(function, *items))
    with ThreadPoolExecutor(num_threads) as threads:
        return list(threads.map(function, *items))


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
