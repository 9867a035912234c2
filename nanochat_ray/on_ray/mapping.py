"""Work spread over a cluster by Ray Data: one task for each item of a plan."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import ray
import ray.data

Row = dict[str, Any]


def say(text: str) -> None:
    print(text, flush=True)


def cores() -> int:
    """Tasks that can run at once. On a laptop Ray is told of more CPUs than there are."""
    nodes = max(1, sum(1 for node in ray.nodes() if node["Alive"]))
    total = int(ray.cluster_resources().get("CPU", 1))
    return max(1, min(total - 1, nodes * (os.cpu_count() or 1)))


def _cause(error: BaseException) -> BaseException:
    """What the work itself raised: Ray and Ray Data each wrap it."""
    while True:
        inner = getattr(error, "cause", None) or error.__cause__
        if not isinstance(inner, BaseException) or inner is error:
            return error
        error = inner


def mapped(plan: Sequence[Any], work: Callable[[Any], Row]) -> Iterator[Row]:
    """``work`` of each item of ``plan`` (JSON values), the results as they come.

    A ValueError or OSError of the work is raised here as it was there, not as Ray wraps it.
    """

    def one(batch: Row) -> Row:
        found = work(json.loads(batch["item"][0]))
        return {name: np.asarray([value]) for name, value in found.items()}

    pool = ray.data.TaskPoolStrategy(size=min(cores(), len(plan)))
    items = [{"item": json.dumps(item)} for item in plan]
    data = ray.data.from_items(items, override_num_blocks=len(items))
    try:
        yield from data.map_batches(one, batch_size=1, compute=pool).iter_rows()
    except Exception as error:
        cause = _cause(error)
        if isinstance(cause, ValueError | OSError):
            raise type(cause)(str(cause)) from None
        raise


class Progress:
    """Prints how far a plan is, every other second."""

    def __init__(self, total: int, what: str):
        self.total, self.what = total, what
        self.began = self.shown = time.perf_counter()
        self.done = self.tokens = self.documents = 0

    def add(self, row: Row) -> None:
        self.done += 1
        self.tokens += int(row.get("tokens", 0))
        self.documents += int(row.get("documents", 0))
        now = time.perf_counter()
        if now - self.shown < 2 and self.done < self.total:
            return
        self.shown, spent = now, now - self.began
        rates = [
            f", {count / 10**digits:.{digits // 3}f} {unit} ({count / spent:,.0f}/s)"
            for count, digits, unit in (
                (self.documents, 0, "documents"),
                (self.tokens, 6, "M tokens"),
            )
            if count
        ]
        left = spent / self.done * (self.total - self.done)
        say(f"  {self.what} {self.done}/{self.total}{''.join(rates)}, {left:.0f} s left")
