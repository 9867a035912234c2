"""Questions that a small model cannot answer, and what it should say: that it does not know, and
what it can do instead. Generated from phrases, offline.

Without these a model that was fine-tuned on a few tasks answers anything else with one of their
answers, or with nothing.
"""

from __future__ import annotations

import random

from nanochat_ray.tasks.phrases import LEADS, phrases, vary
from nanochat_ray.tasks.task import DEFAULT_SIZE, Split
from nanochat_ray.text.chat import Message

ANSWERS = phrases("""
    I do not know: I am a very small model. I can calculate, count the legs of animals, and tell you
    about myself. | That is more than I have learned. Ask me for a sum, for the legs of some
    animals, or who I am. | I cannot answer that: I am too small. I am good at sums, such as
    12 + 30 - 7.
""")
_SUBJECTS = {
    "place": phrases("""
        France|Japan|Brazil|Kenya|Canada|Italy|Peru|India|Norway|Egypt|Spain|China|Mexico|Iceland
        |Paris|London|Berlin|Tokyo|Rome|New York|Mars|the Moon|the Sahara|the Amazon
    """),
    "person": phrases("""
        Napoleon|Einstein|Shakespeare|Marie Curie|Mozart|Cleopatra|Newton|Ada Lovelace|Gandhi
        |the president|Darwin|Plato|Picasso|Galileo|my neighbor|your favorite singer
    """),
    "thing": phrases("""
        a computer|the sun|a volcano|gravity|a black hole|an engine|the internet|a rainbow|music
        |love|money|a piano|the ocean|snow|a star|electricity|Python|a neural network|chess
        |football|coffee|bread|a tree|the weather|time|a dream|history|the news|a database|Linux
    """),
    "action": phrases("""
        cook rice|bake bread|learn French|play the guitar|fix a bike|write a book|grow tomatoes
        |sleep better|run a marathon|make friends|save money|sort a list|read faster|draw a horse
        |paint a wall|plan a trip|train a dog|tie a knot|open a bank account|lose weight
    """),
    "year": phrases("1492|1789|1815|1914|1945|1969|1989|1999|2001|2008|2012|2016|2018|2022|2024"),
    "work": phrases(
        "a poem|a story|a song|a letter|a joke|an essay|an email|a program|a recipe|a speech"
    ),
}
_FORMS = {
    "place": phrases("""
        What is the capital of {}?|Where is {}?|How far away is {}?|Tell me about {}.
        |How many people live in {}?|What is the weather in {}?|Should I visit {}?
    """),
    "person": phrases("""
        Who was {}?|Who is {}?|When was {} born?|Tell me about {}.|Where does {} live?
        |What did {} say?|Do you know {}?|Write about {}.
    """),
    "thing": phrases("""
        What is {}?|How does {} work?|Why is {} important?|Explain {}.|Who made {}?
        |Tell me about {}.|What do you think about {}?|Why do people like {}?|Describe {}.
        |what is {}|explain {} to me|Is {} good?|Where does {} come from?
    """),
    "action": phrases("""
        How do I {}?|Can you {}?|Help me {}.|What is the best way to {}?|how to {}
        |Teach me to {}.|Why should I {}?|When should I {}?
    """),
    "year": phrases("""
        Who won the world cup in {}?|What happened in {}?|Who was president in {}?|Tell me about {}.
        |Was {} a good year?|Who won the election of {}?|What was invented in {}?
        |Why was there a war in {}?
    """),
    "work": phrases("""
        Write {}.|Write {} about the sea.|Can you write {}?|Tell me {}.|write {} for me
        |Finish {} for me.|I need {} for my mother.
    """),
    "": phrases("""
        Why is the sky blue?|What day is it?|What time is it?|Who won the game?|asdf
        |Translate this into German.|What is the meaning of life?|Where am I?|Why?|???
        |What should I eat today?|Why not?|Summarize this text.|Is it going to rain?|qwerty|hjkl
        |What is the tallest mountain?|Tell me a secret.|What is the fastest animal?|test|blah blah
        |How come?|...|?|!|😀|👍|Tell me more.|And then?|Continue.|What else?|Explain.|xyz|foo bar
        |asdfghjkl|What is the weather like today?|Surprise me.|Sing.|Who cares?|abc|lorem ipsum
    """),
}


class Limits:
    """One question that is out of reach; right is any answer that says so."""

    name = "limits"

    def __init__(self, split: Split, size: int | None, seed: int):
        self._split, self._size, self._seed = split, size or DEFAULT_SIZE, seed

    def __len__(self) -> int:
        return self._size

    def _draw(self, index: int) -> tuple[str, str]:
        """Question and answer."""
        rng = random.Random(f"{self._seed}/{self._split}/{index}")
        kind = rng.choice(("place", "person", "thing", "thing", "action", "year", "work", "", ""))
        form = rng.choice(_FORMS[kind])
        question = form.format(rng.choice(_SUBJECTS[kind])) if kind else form
        return vary(rng, rng.choice(LEADS[self._split]) + question), rng.choice(ANSWERS)

    def question(self, index: int) -> list[Message]:
        return [{"role": "user", "content": self._draw(index)[0]}]

    def example(self, index: int) -> list[Message]:
        question, answer = self._draw(index)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def grade(self, index: int, answer: str) -> bool:
        return answer.strip() in ANSWERS
