"""Procedural tasks with verifiable answers, from reasoning-gym (Stojanovski et al., arXiv
2505.24760). They need no network, and any number of different questions can be generated.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nanochat_ray.tasks.task import DEFAULT_SIZE, Split, calculator_turn
from nanochat_ray.text.chat import Message

Solve = Callable[[str, str], Any]
"""(question, right answer) → content of the assistant's message."""


def _plain(question: str, answer: str) -> Any:
    return answer


def _sum(question: str, answer: str) -> Any:
    expression = question.split(":", 1)[1].rstrip("= ").strip()
    return calculator_turn(expression, answer, answer)


def _product(question: str, answer: str) -> Any:
    expression = question.split(":", 1)[1].split(".")[0].strip()
    return calculator_turn(expression, answer, answer)


def _letters(question: str, answer: str) -> Any:
    match = re.search(r'letter "(.)" appear in the text: "(.*)"\?', question, re.DOTALL)
    assert match is not None
    letter, text = match.groups()
    # reasoning-gym ignores case.
    return calculator_turn(f'"{text.lower()}".count("{letter}")', answer, answer)


@functools.lru_cache(maxsize=1)
def _legs() -> dict[str, int]:
    from reasoning_gym.arithmetic.leg_counting import ANIMALS

    return {animal: int(legs) for animal, legs in ANIMALS.items()}


def _leg_sum(question: str, answer: str) -> Any:
    counts = re.findall(r"(\d+) ([a-z ]+?)(?:,|\?)", question.rsplit("if you have ", 1)[1])
    legs = _legs()
    terms = []
    for count, animal in counts:
        singular = animal if animal in legs else animal.removesuffix("s")
        terms.append(f"{count} * {legs[singular]}")
    return calculator_turn(" + ".join(terms), answer, answer)


def _equation(question: str, answer: str) -> Any:
    """a*x + b = c, with the terms in any order: x = (c - b) // a."""
    linear, _, value_text = question.rpartition(": ")[2].partition(" = ")
    sums = {True: 0, False: 0}  # of the factors of x, and of the constants
    for sign, number, letter in re.findall(r"(-?) ?(?:(\d+)\*?)?([a-z]?)", linear):
        if number or letter:
            sums[bool(letter)] += (-1 if sign else 1) * int(number or 1)
    factor, constant, value = sums[True], sums[False], int(value_text)
    if factor < 0:
        factor, constant, value = -factor, -constant, -value
    if not factor:
        return answer
    expression = str(value)
    if constant:
        expression += f" - {constant}" if constant > 0 else f" + {-constant}"
    if factor > 1:
        expression = f"({expression}) // {factor}" if constant else f"{expression} // {factor}"
    return calculator_turn(expression, answer, answer)


@dataclass(frozen=True)
class Kind:
    dataset: str
    solve: Solve = _plain
    config: dict[str, Any] = field(default_factory=dict)


_DIGITS = {"min_digits": 1, "max_digits": 2}
KINDS = {
    "chain_sum": Kind("chain_sum", _sum, {"min_terms": 2, "max_terms": 3, **_DIGITS}),
    "products": Kind("products", _product, {"min_terms": 2, "max_terms": 2, **_DIGITS}),
    "leg_counting": Kind("leg_counting", _leg_sum, {"min_animals": 1, "max_animals": 3}),
    "letter_counting": Kind("letter_counting", _letters, {"min_words": 1, "max_words": 3}),
    "simple_equations": Kind("simple_equations", _equation),
    "spell_backward": Kind("spell_backward", _plain, {"min_word_len": 3, "max_word_len": 6}),
}


def kind_of(name: str) -> Kind:
    """The kind of a name; any other data set of reasoning-gym has its own defaults."""
    return KINDS.get(name) or Kind(name)


def split_of(question: str) -> Split:
    """By the question's hash, so that no question can be in two splits."""
    bucket = hashlib.sha256(question.encode()).digest()[0] % 16
    return "test" if bucket == 0 else "val" if bucket == 1 else "train"


@functools.lru_cache(maxsize=64)
def _items(
    name: str, split: Split, size: int, seed: int, options: tuple[tuple[str, Any], ...]
) -> tuple[tuple[str, str], ...]:
    """(question, answer); in "val" and "test" each question occurs once."""
    import reasoning_gym

    kind = kind_of(name)
    config = {**kind.config, **dict(options)}
    try:
        # More than are ever needed: an item is generated on access.
        source = reasoning_gym.create_dataset(kind.dataset, seed=seed, size=size * 400, **config)
    except AssertionError as error:
        raise ValueError(f"task={name!r} cannot have the options {config}: {error}") from None
    items: list[tuple[str, str]] = []
    questions: set[str] = set()
    for number in range(size * 400):
        item = source[number]
        question, answer = item["question"], str(item["answer"])
        if split_of(question) != split or (split != "train" and question in questions):
            continue
        questions.add(question)
        items.append((question, answer))
        if len(items) == size:
            break
    return tuple(items)


class ReasoningTask:
    """One of ``KINDS``, or of reasoning-gym's data sets.

    The answer is exact, and in examples computed by the calculator where possible. reasoning-gym's
    own graders are not used, since some evaluate what a model wrote. ``options`` are those of the
    data set's configuration, such as ``min_terms=4``.
    """

    def __init__(self, name: str, split: Split, size: int | None, seed: int, **options: Any):
        self.name = name
        self._kind = kind_of(name)
        self._items = _items(name, split, size or DEFAULT_SIZE, seed, tuple(options.items()))

    def __len__(self) -> int:
        return len(self._items)

    def question(self, index: int) -> list[Message]:
        return [{"role": "user", "content": self._items[index][0].strip()}]

    def example(self, index: int) -> list[Message]:
        question, answer = self._items[index]
        content = self._kind.solve(question, answer)
        return [*self.question(index), {"role": "assistant", "content": content}]

    def grade(self, index: int, answer: str) -> bool:
        return answer.strip() == self._items[index][1].strip()
