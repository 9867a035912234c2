"""What a task is: questions with ideal answers, and a program that grades what a model says."""

from __future__ import annotations

from typing import Literal, Protocol

from nanochat_ray.text.chat import Message

Split = Literal["train", "val", "test"]


class Task(Protocol):
    """Random access by index; equal arguments give equal examples in every process.

    The splits of a task never share a question.
    """

    name: str

    def __len__(self) -> int: ...

    def question(self, index: int) -> list[Message]:
        """The conversation up to where the assistant is to answer."""
        ...

    def example(self, index: int) -> list[Message]:
        """The question with the answer that a model should learn."""
        ...

    def grade(self, index: int, answer: str) -> bool:
        """Whether ``answer``, the text that the assistant said, is right."""
        ...


def calculated(expression: str, result: str, text: str) -> list[Message]:
    """Content of an assistant that computes ``expression`` and then says ``text``."""
    return [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": result},
        {"type": "text", "text": text},
    ]
