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


_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": OSError}


def mapped(plan: Sequence[Any], work: Callable[[Any], Row]) -> Iterator[Row]:
    """``work`` of each item of ``plan`` (JSON values in and out), the results as they come.

    A ValueError or OSError of the work is raised here with its message. It travels as a result,
    since Ray Data would wrap it, lose its cause, and print its trace.
    """

    def one(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        try:
            found = work(json.loads(batch["item"][0]))
        except tuple(_ERRORS.values()) as error:
            kind = "OSError" if isinstance(error, OSError) else "ValueError"
            found = {"error": [kind, str(error)]}
        return {"row": np.asarray([json.dumps(found)])}

    pool = ray.data.TaskPoolStrategy(size=min(cores(), len(plan)))
    items = [{"item": json.dumps(item)} for item in plan]
    data = ray.data.from_items(items, override_num_blocks=len(items))
    for made in data.map_batches(one, batch_size=1, compute=pool).iter_rows():
        row = json.loads(made["row"])
        if "error" in row:
            kind, message = row["error"]
            raise _ERRORS[kind](message)
        yield row


class Progress:
    """Prints how far a plan is, every other second."""

    def __init__(self, total: int, what: str):
        self.total, self.what = total, what
        self.began = self.shown = time.perf_counter()
        self.done = self.tokens = self.documents = 0

    def add(self, row: Row) -> None:
        self.done += 1
        self.tokens += row.get("tokens", 0)
        self.documents += row.get("documents", 0)
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
