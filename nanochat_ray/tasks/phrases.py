"""Phrases as people type them."""

from __future__ import annotations

import random

from nanochat_ray.tasks.task import Split

LEADS: dict[Split, tuple[str, ...]] = {
    "train": ("", "", "", "", "So, "),
    "val": ("Well, ",),
    "test": ("Now then, ",),
}
"""Prefixes of questions from fixed phrases, which differ by split, so that splits share none."""


def phrases(text: str) -> tuple[str, ...]:
    """``text`` divided at ``|``, each part on one line."""
    return tuple(phrase.strip() for phrase in " ".join(text.split()).split("|"))


def vary(rng: random.Random, text: str) -> str:
    """Some people begin without a capital, and end without a mark."""
    if rng.random() < 0.3:
        text = text[:1].lower() + text[1:]
    return text.rstrip(".?!") or text if rng.random() < 0.3 else text
