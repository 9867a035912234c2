"""Phrases as people type them."""

from __future__ import annotations

import random

from nanochat_ray.tasks.task import Split


def phrases(text: str) -> tuple[str, ...]:
    """``text`` divided at ``|``, each part on one line."""
    return tuple(phrase.strip() for phrase in " ".join(text.split()).split("|"))


_TRAIN_LEADS = phrases("""
    So,|And|Please,|Tell me,|Listen,|Look,|Excuse me,|By the way,|One question:|Question:|Next,
    |Also,|Anyway,|Honestly,|Just curious,|Seriously,|First,|Finally,|Quickly,|Oh,|Ah,|Um,|But
    |Dear model,|Hey nanochat,|Let me ask:|My friend,|Sir,|To begin,|Let us see:|Right,|Again,
""")
LEADS: dict[Split, tuple[str, ...]] = {
    "train": (*("",) * len(_TRAIN_LEADS), *(f"{lead} " for lead in _TRAIN_LEADS)),
    "val": ("Well, ",),
    "test": ("Now then, ",),
}
"""Prefixes of questions from fixed phrases, which differ by split, so that splits share none. Every
second training question has one of many, so that the model learns to read past another one."""


def vary(rng: random.Random, text: str) -> str:
    """Some people begin without a capital, and end without a mark."""
    if rng.random() < 0.3:
        text = text[:1].lower() + text[1:]
    return text.rstrip(".?!") or text if rng.random() < 0.3 else text
