"""Tasks by name: a new task is one line in ``_FACTORIES``."""

from __future__ import annotations

import functools

from nanochat_ray.tasks import hub
from nanochat_ray.tasks.identity import Identity
from nanochat_ray.tasks.reasoning import KINDS, ReasoningTask, SpokenSums
from nanochat_ray.tasks.task import Split, Task, TaskFactory

DEFAULT_MIXTURE = (
    "chain_sum:4500",
    "spoken_sums:1500",
    "leg_counting:3000",
    "products:2000",
    "identity:1500",
)
"""Conversations of the default fine-tuning, as task:count; all are generated offline."""
_FACTORIES: dict[str, TaskFactory] = {
    **{name: functools.partial(ReasoningTask, name) for name in KINDS},
    **{name: functools.partial(hub.HubTask, name) for name in hub.NAMES},
    "identity": Identity,
    "spoken_sums": SpokenSums,
}


def names() -> list[str]:
    return sorted(_FACTORIES)


def make_task(name: str, split: Split, size: int | None = None, seed: int = 0) -> Task:
    """The task of a name with at most ``size`` examples. ValueError for an unknown name."""
    if name not in _FACTORIES:
        raise ValueError(f"task={name!r} is not known: one of {', '.join(names())}")
    return _FACTORIES[name](split, size, seed)
