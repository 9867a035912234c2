"""The chat data that nanochat trains on, by name, from the Hugging Face Hub (needs a network).

The converters are plain functions from a data set's row to messages.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from typing import Any

from nanochat_ray.tasks.task import Split
from nanochat_ray.text.chat import Message

LETTERS = "ABCD"


def smoltalk(row: dict[str, Any]) -> list[Message]:
    """HuggingFaceTB/smol-smoltalk: conversations as they are."""
    return [{"role": m["role"], "content": m["content"]} for m in row["messages"]]


def mmlu(row: dict[str, Any]) -> list[Message]:
    """cais/mmlu: a question with four choices, answered by a letter."""
    choices = "\n".join(
        f"- {choice}={letter}" for letter, choice in zip(LETTERS, row["choices"], strict=True)
    )
    ask = f"Multiple choice question: {row['question']}\n{choices}\n\nRespond with the letter."
    return [
        {"role": "user", "content": ask},
        {"role": "assistant", "content": LETTERS[row["answer"]]},
    ]


def gsm8k(row: dict[str, Any]) -> list[Message]:
    """openai/gsm8k (Cobbe et al., arXiv 2110.14168): ``<<12*3=36>>`` is a calculator turn."""
    parts: list[Message] = []
    for piece in re.split(r"(<<[^>]*>>)", row["answer"]):
        if piece.startswith("<<") and piece.endswith(">>"):
            expression, _, result = piece[2:-2].rpartition("=")
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result})
        elif piece:
            parts.append({"type": "text", "text": piece})
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": parts},
    ]


HELD_APART = 32
"""One in this many questions of a Hub's train split is for validation, where the Hub has no split
for that: its test split is for the final measurement alone."""

_SETS: dict[str, tuple[str, str | None, dict[Split, str], Any]] = {
    "smoltalk": (
        "HuggingFaceTB/smol-smoltalk",
        None,
        {"train": "train", "val": "train", "test": "test"},
        smoltalk,
    ),
    "mmlu": (
        "cais/mmlu",
        "all",
        {"train": "auxiliary_train", "val": "validation", "test": "test"},
        mmlu,
    ),
    "gsm8k": ("openai/gsm8k", "main", {"train": "train", "val": "train", "test": "test"}, gsm8k),
}
NAMES = tuple(_SETS)


def _said(content: Any) -> str:
    """What an assistant's content says aloud, calculator turns left out."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def final_answer(name: str, text: str) -> str:
    """The part of an answer that is graded: the number after ``####`` for gsm8k, else all."""
    if name == "gsm8k":
        found = re.findall(r"####\s*(-?[\d.,]+)", text)
        return found[-1].replace(",", "").rstrip(".") if found else ""
    return text.strip()


def _held_apart(messages: list[Message]) -> bool:
    """By what the user asks first, so that a question that comes twice is in one split."""
    first = next((m["content"] for m in messages if m["role"] == "user"), "")
    return hashlib.sha256(first.encode("utf-8", "replace")).digest()[0] % HELD_APART == 0


class HubTask:
    """A data set of the Hub, shuffled by ``seed``. Raises ValueError if it cannot be had."""

    def __init__(self, name: str, split: Split, size: int | None, seed: int, data: Any = None):
        self.name = name
        path, config, splits, self._convert = _SETS[name]
        if data is None:
            try:
                import datasets
            except ImportError:
                raise ValueError(
                    f"task={name!r} needs the Hub client: pip install 'nanochat_ray[hub]'"
                ) from None
            try:
                data = datasets.load_dataset(path, config, split=splits[split])
            except Exception as error:
                raise ValueError(
                    f"task={name!r} cannot be had from the Hub ({path}): {error}"
                ) from None
            data = data.shuffle(seed=seed)
        self._data = data
        shares = splits["train"] == splits["val"] and split != "test"
        rows = (i for i in range(len(data)) if not shares or self._is_of(i, split))
        self._rows = list(itertools.islice(rows, size or None))

    def _is_of(self, row: int, split: Split) -> bool:
        return _held_apart(self._convert(self._data[row])) == (split == "val")

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> list[Message]:
        return self._convert(self._data[self._rows[index]])

    def question(self, index: int) -> list[Message]:
        return self.example(index)[:-1]

    def grade(self, index: int, answer: str) -> bool:
        right = _said(self.example(index)[-1]["content"])
        return final_answer(self.name, answer) == final_answer(self.name, right)
