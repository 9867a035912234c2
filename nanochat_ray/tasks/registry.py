"""Tasks by name."""

from __future__ import annotations

from nanochat_ray.tasks import hub
from nanochat_ray.tasks.identity import Identity
from nanochat_ray.tasks.reasoning import KINDS, ReasoningTask, SpokenSums
from nanochat_ray.tasks.task import Split, Task

DEFAULT_MIXTURE = (
    "chain_sum:4500",
    "spoken_sums:1500",
    "leg_counting:3000",
    "products:2000",
    "identity:1500",
)
"""Conversations of the default fine-tuning, as task:count; all made offline."""


def names() -> list[str]:
    return sorted([*KINDS, *hub.NAMES, "identity", "spoken_sums"])


def make_task(name: str, split: Split, size: int | None = None, seed: int = 0) -> Task:
    """The task of a name with at most ``size`` examples. ValueError for an unknown name."""
    if name in KINDS:
        return ReasoningTask(name, split, size or 1000, seed)
    if name == "spoken_sums":
        return SpokenSums(split, size or 1000, seed)
    if name == "identity":
        return Identity(split, size or 1000, seed)
    if name in hub.NAMES:
        return hub.HubTask(name, split, size, seed)
    raise ValueError(f"task={name!r} is not known: one of {', '.join(names())}")
