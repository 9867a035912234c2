"""The chat data sets that nanochat trains on, from the Hugging Face Hub (needs a network).

The converters are plain functions from a row of a data set to messages.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
from typing import Any

from nanochat_ray.checks import short_repr
from nanochat_ray.data import records
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
    for text in re.split(r"(<<[^>]*>>)", row["answer"]):
        if text.startswith("<<") and text.endswith(">>"):
            expression, _, result = text[2:-2].rpartition("=")
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result})
        elif text:
            parts.append({"type": "text", "text": text})
    return [
        {"role": "user", "content": row["question"]},
        {"role": "assistant", "content": parts},
    ]


VAL_STRIDE = 32
"""One in this many questions of the Hub's train split is for validation, where the Hub has no
validation split: its test split is for the final measurement only."""

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


def _text_of(content: Any) -> str:
    """The text of an assistant's content, without calculator calls and results."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def final_answer(name: str, text: str) -> str:
    """The part of an answer that is graded: the number after ``####`` for gsm8k, else all."""
    if name == "gsm8k":
        numbers = re.findall(r"####\s*(-?[\d.,]+)", text)
        return numbers[-1].replace(",", "").rstrip(".") if numbers else ""
    return text.strip()


def _is_val(messages: list[Message]) -> bool:
    """By the hash of the first question, so that equal questions are in one split."""
    first = next((m["content"] for m in messages if m["role"] == "user"), "")
    return hashlib.sha256(first.encode("utf-8", "replace")).digest()[0] % VAL_STRIDE == 0


def read_folder(path: str, split: str, seed: int) -> list[Any]:
    """The rows of a split in a copy of a data set, shuffled: files such as ``test.jsonl``, or in
    the Hub's layout ``main/test-00000-of-00001.parquet``. ValueError if there are none."""
    names = re.compile(rf"{split}([-._].*)?\.(jsonl|json|parquet)(\.\w+)?")
    sources = records.find_files(path, "path")
    files = [s for s in sources if names.fullmatch(s.uri.partition("?")[0].rpartition("/")[2])]
    if not files:
        raise ValueError(f"path={path!r} has no file of the split {split}, such as {split}.jsonl")
    rows = [row for file in files for _, row in records.read(file, "path")]
    random.Random(seed).shuffle(rows)
    return rows


class HubTask:
    """A data set of the Hub, shuffled by ``seed``. Raises ValueError if it cannot be loaded.

    ``path``: a folder or URI with a copy, to be read instead of the Hub.
    """

    def __init__(
        self,
        name: str,
        split: Split,
        size: int | None,
        seed: int,
        data: Any = None,
        *,
        path: str = "",
    ):
        self.name = self._kind = name
        hub_path, config, splits, self._convert = _SETS[name]
        if path:
            data = read_folder(path, splits[split], seed)
        if data is None:
            try:
                import datasets
            except ImportError:
                raise ValueError(
                    f"task={name!r} needs the Hub client: pip install 'nanochat_ray[hub]'"
                ) from None
            try:
                data = datasets.load_dataset(hub_path, config, split=splits[split])
            except Exception as error:
                raise ValueError(
                    f"task={name!r} cannot be loaded from the Hub ({hub_path}): {error}"
                ) from None
            data = data.shuffle(seed=seed)
        self._data = data
        is_shared = splits["train"] == splits["val"] and split != "test"
        rows = (i for i in range(len(data)) if not is_shared or self._is_of(i, split))
        self._rows = list(itertools.islice(rows, size or None))

    def _messages(self, row: int) -> list[Message]:
        try:
            return self._convert(self._data[row])
        except (LookupError, TypeError, AttributeError) as error:
            rule = f"its fields are not those of {_SETS[self._kind][0]}"
            value = short_repr(self._data[row])
            raise ValueError(f"task={self.name!r}: row {value}: {rule} ({error!r})") from None

    def _is_of(self, row: int, split: Split) -> bool:
        return _is_val(self._messages(row)) == (split == "val")

    def __len__(self) -> int:
        return len(self._rows)

    def example(self, index: int) -> list[Message]:
        return self._messages(self._rows[index])

    def question(self, index: int) -> list[Message]:
        return self.example(index)[:-1]

    def grade(self, index: int, answer: str) -> bool:
        answer_text = _text_of(self.example(index)[-1]["content"])
        return final_answer(self._kind, answer) == final_answer(self._kind, answer_text)
