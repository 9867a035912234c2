"""Small word problems, as people try them on a chat page. Generated from phrases, offline."""

from __future__ import annotations

import random

from nanochat_ray.tasks.phrases import phrases, vary
from nanochat_ray.tasks.reasoning import split_of
from nanochat_ray.tasks.spoken import calculation
from nanochat_ray.tasks.task import DEFAULT_SIZE, Split
from nanochat_ray.text.chat import Message
from nanochat_ray.text.tools import calculate

_THINGS = phrases("""
    apples|eggs|books|coins|cookies|pens|balls|cards|stamps|oranges|dollars|cakes|cars|flowers
    |bananas|toys|shirts|cups|stones|stickers
""")
_NAMES = phrases("Tom|Anna|Ben|Mary|Sam|Lisa|John|Eva|Max|Sara|Paul|Ida|Bob|Alice")
_FORMS = {
    "+": phrases("""
        I have {a} {things} and buy {b} more. How many {things} do I have?
        |{name} has {a} {things} and gets {b} more. How many {things} does {name} have?
        |{name} has {a} {things} and I have {b}. How many {things} do we have together?
        |There are {a} {things} on the table and {b} in the box. How many {things} are there?
        |If I have {a} {things} and you give me {b}, how many do I have?
        |I found {a} {things} today and {b} {things} yesterday. How many is that?
    """),
    "-": phrases("""
        I have {a} {things} and give away {b}. How many {things} are left?
        |{name} had {a} {things} and lost {b}. How many {things} does {name} have now?
        |There were {a} {things}, and {b} are gone. How many are left?
        |If I have {a} {things} and sell {b}, how many do I have?
        |{name} has {a} {things} and I have {b}. How many more does {name} have?
    """),
    "*": phrases("""
        There are {a} boxes with {b} {things} each. How many {things} are there?
        |{name} buys {a} bags of {b} {things}. How many {things} is that?
        |I get {b} {things} every day. How many {things} do I get in {a} days?
        |{a} people have {b} {things} each. How many {things} do they have?
    """),
}


class Stories:
    """One word problem with two numbers."""

    name = "stories"

    def __init__(self, split: Split, size: int | None, seed: int):
        self._items: list[tuple[str, str]] = []
        """Question and expression. Each question occurs once."""
        rng = random.Random(f"{seed}/stories")
        questions: set[str] = set()
        while len(self._items) < (size or DEFAULT_SIZE):
            question, expression = _draw(rng)
            if split_of(question) == split and question not in questions:
                questions.add(question)
                self._items.append((vary(rng, question), expression))

    def __len__(self) -> int:
        return len(self._items)

    def question(self, index: int) -> list[Message]:
        return [{"role": "user", "content": self._items[index][0]}]

    def example(self, index: int) -> list[Message]:
        return [*self.question(index), calculation(self._items[index][1])]

    def grade(self, index: int, answer: str) -> bool:
        return answer.strip() == calculate(self._items[index][1])


def _draw(rng: random.Random) -> tuple[str, str]:
    """A question, and the expression that answers it."""
    sign = rng.choice(sorted(_FORMS))
    most = 12 if sign == "*" else rng.choice((12, 99))
    numbers = [rng.randint(2, most), rng.randint(2, most)]
    if sign == "-":
        numbers.sort(reverse=True)
    a, b = numbers
    form = rng.choice(_FORMS[sign])
    question = form.format(a=a, b=b, things=rng.choice(_THINGS), name=rng.choice(_NAMES))
    return question, f"{a} {sign} {b}"
