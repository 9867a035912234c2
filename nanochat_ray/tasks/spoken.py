"""Arithmetic and legs as people ask for them, rather than as reasoning-gym does."""

from __future__ import annotations

import random
import re

from nanochat_ray.tasks.phrases import phrases, vary
from nanochat_ray.tasks.reasoning import ReasoningTask, split_of
from nanochat_ray.tasks.task import DEFAULT_SIZE, Split, calculator_turn
from nanochat_ray.text.chat import Message
from nanochat_ray.text.tools import calculate

_ASK = phrases("""
    What is {}?|What is {}?|Compute {}.|How much is {}?|{} = ?|{}|{}|{} =|What's {}?|Calculate {}.
    |Can you calculate {}?|Please compute {}.|Solve {}.|Tell me {}.|Do you know what {} is?|{}?
    |What does {} give?|Please calculate {} for me.
""")
_ASK_WITH_VERB = {
    "+": phrases("""
        Add {} and {}.|Add {} to {}.|Please add {} and {}.|What is the sum of {} and {}?
        |The sum of {} and {}|Can you add {} and {}?|{} and {}, how much is that together?
    """),
    "-": phrases("""
        Subtract {1} from {0}.|What is the difference of {0} and {1}?|Take {1} away from {0}.
        |{0} take away {1}|{0} less {1}|How much is {0} without {1}?
    """),
    "*": phrases("""
        Multiply {} by {}.|Multiply {} and {}.|What is the product of {} and {}?|{} multiplied by {}
        |The product of {} and {}|Can you multiply {} by {}?
    """),
    "/": phrases("""
        Divide {} by {}.|What is {} divided by {}?|{} over {}|How often does {1} go into {0}?
        |The quotient of {} and {}|Can you divide {} by {}?
    """),
}
"""Of two terms."""
_ADD_THREE = phrases("""
    Add {}, {} and {}.|Please add {}, {} and {}.|What is the sum of {}, {} and {}?
    |Sum up {}, {} and {}.
""")
_SIGNS = {
    "+": ("+", "plus"),
    "-": ("-", "minus"),
    "*": ("*", "times", "x", "×"),
    "/": ("/", "divided by", "÷", ":"),
}
NUMBER_WORDS = phrases("""
    zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen
    |sixteen|seventeen|eighteen|nineteen|twenty
""")
ONE_IN = 6
"""Training questions of ``SpokenLegs`` of which one has a single animal."""


def ask_for(expression: str) -> str:
    """A question for ``12 + 7 - 3``, always the same one."""
    rng = random.Random(expression)
    terms, signs = expression.split()[::2], expression.split()[1::2]
    is_spelled = all(int(term) < len(NUMBER_WORDS) for term in terms) and rng.random() < 0.3
    if is_spelled:
        terms = [NUMBER_WORDS[int(term)] for term in terms]
    if len(signs) == 1 and rng.random() < 0.3:
        return vary(rng, rng.choice(_ASK_WITH_VERB[signs[0]]).format(*terms))
    if signs == ["+", "+"] and rng.random() < 0.3:
        return vary(rng, rng.choice(_ADD_THREE).format(*terms))
    style = 1 if is_spelled else rng.choice((0, 0, 1, 2, 3))
    words = [_SIGNS[sign][style % len(_SIGNS[sign])] for sign in signs]
    space = "" if not is_spelled and rng.random() < 0.25 and style != 1 else " "
    text = terms[0] + "".join(
        f"{space}{word}{space}{term}" for word, term in zip(words, terms[1:], strict=True)
    )
    return vary(rng, rng.choice(_ASK).format(text))


def _expressions(kind: str, split: Split, size: int, seed: int) -> list[str]:
    """Of chain_sum or products, whose splits are theirs, or whole quotients."""
    if kind != "quotients":
        task = ReasoningTask(kind, split, size, seed + 1)
        return [task.example(i)[1]["content"][0]["text"] for i in range(len(task))]
    quotients = [f"{b * q} / {b}" for b in range(2, 31) for q in range(2, 100)]
    own = [expression for expression in quotients if split_of(expression) == split]
    random.Random(f"{seed}/quotients").shuffle(own)
    return own[:size]


class SpokenArithmetic:
    """The expressions of ``chain_sum`` or ``products``, or whole quotients."""

    def __init__(self, kind: str, split: Split, size: int | None, seed: int):
        self.name = {"chain_sum": "spoken_sums"}.get(kind, f"spoken_{kind}")
        self._expressions = _expressions(kind, split, size or DEFAULT_SIZE, seed)

    def __len__(self) -> int:
        return len(self._expressions)

    def question(self, index: int) -> list[Message]:
        return [{"role": "user", "content": ask_for(self._expressions[index])}]

    def example(self, index: int) -> list[Message]:
        return [*self.question(index), calculation(self._expressions[index])]

    def grade(self, index: int, answer: str) -> bool:
        return answer.strip() == calculate(self._expressions[index])


def calculation(expression: str) -> Message:
    """The assistant's turn that calculates it and says the result."""
    result = calculate(expression)
    assert result is not None
    return {"role": "assistant", "content": calculator_turn(expression, result, result)}


def sent_back(turn: Message) -> Message:
    """A calculated answer as clients send it back with the next question: its text alone. It is not
    trained on, since the model would learn to answer without the calculator."""
    *_, last = turn["content"]
    return {"role": "assistant", "content": [{**last, "weight": 0}]}


class FollowUps:
    """A sum, and then a question about its result. Every second sum is as clients send it back."""

    name = "follow_ups"
    _ASK = (
        *(("+", text) for text in phrases("And plus {}?|Plus {}|Now add {}.|+ {}|Add {}.")),
        *(("-", text) for text in phrases("And minus {}?|Minus {}|Now subtract {}.|- {}")),
        *(("*", text) for text in phrases("Times {}?|Now multiply it by {}.|* {}|And times {}?")),
    )

    def __init__(self, split: Split, size: int | None, seed: int):
        self._sums = SpokenArithmetic("chain_sum", split, size, seed + 21)
        self._split, self._seed = split, seed
        # Splits differ in the last question too.
        self._numbers = [n for n in range(2, 100) if split_of(f"then {n}") == split]

    def __len__(self) -> int:
        return len(self._sums)

    def _last(self, index: int) -> tuple[str, str]:
        """The last question, and the expression that answers it."""
        rng = random.Random(f"{self._seed}/{self._split}/then/{index}")
        sign, ask = rng.choice(self._ASK)
        number = rng.choice(self._numbers)
        result = self._sums.example(index)[1]["content"][-1]["text"]
        return vary(rng, ask.format(number)), f"{result} {sign} {number}"

    def question(self, index: int) -> list[Message]:
        question, turn = self._sums.example(index)
        turn = sent_back(turn) if index % 2 else turn
        return [question, turn, {"role": "user", "content": self._last(index)[0]}]

    def example(self, index: int) -> list[Message]:
        return [*self.question(index), calculation(self._last(index)[1])]

    def grade(self, index: int, answer: str) -> bool:
        return answer.strip() == calculate(self._last(index)[1])


class SpokenLegs:
    """The animals of ``leg_counting``."""

    name = "spoken_legs"
    _ASK = phrases("""
        How many legs do {} have?|How many legs have {}?|Count the legs of {}.|How many legs are {}?
        |{}, how many legs?
    """)
    _ASK_ONE = phrases("""
        How many legs does {} have?|How many legs has {}?|Count the legs of {}.|Legs of {}?
    """)

    def __init__(self, split: Split, size: int | None, seed: int):
        # The split of a question is that of its animals in leg_counting.
        self._many = ReasoningTask("leg_counting", split, size, seed + 1)
        self._ones: ReasoningTask | None = None
        if split == "train":
            options = {"max_animals": 1, "max_instances": 1}
            self._ones = ReasoningTask("leg_counting", split, len(self._many), seed + 1, **options)

    def __len__(self) -> int:
        return len(self._many)

    def _inner(self, index: int) -> ReasoningTask:
        return self._ones if self._ones and index % ONE_IN == 0 else self._many

    def question(self, index: int) -> list[Message]:
        text = self._inner(index).question(index)[0]["content"]
        rng = random.Random(text)
        *others, last = text.rsplit("if you have ", 1)[1].rstrip("?").split(", ")
        animals = f"{', '.join(others)} and {last}" if others else last
        ask = rng.choice(self._ASK)
        if one := re.fullmatch(r"1 ([a-z ]+)", animals):
            ask = rng.choice(self._ASK_ONE)
            animals = f"{'an' if one[1][0] in 'aeiou' else 'a'} {one[1]}"
        return [{"role": "user", "content": vary(rng, ask.format(animals))}]

    def example(self, index: int) -> list[Message]:
        return [*self.question(index), self._inner(index).example(index)[1]]

    def grade(self, index: int, answer: str) -> bool:
        return self._inner(index).grade(index, answer)
