"""What a preparation prints: messages, and the progress of its tasks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from nanochat_ray.data.map_tasks import MapTasks, TaskResult, Work

INTERVAL = 2.0
"""Seconds between two lines of progress."""


def log(message: str) -> None:
    print(message, flush=True)


class Progress:
    """Prints the share of a plan that is complete, with its rates and the remaining time."""

    def __init__(self, num_tasks: int, label: str):
        self.num_tasks, self.label = num_tasks, label
        self.start = self.last_line = time.perf_counter()
        self.num_complete = self.tokens = self.documents = 0

    def add(self, result: TaskResult) -> None:
        """Counts one result; ``tokens`` and ``documents`` in it give the rates."""
        self.num_complete += 1
        self.tokens += result.get("tokens", 0)
        self.documents += result.get("documents", 0)
        now = time.perf_counter()
        if now - self.last_line < INTERVAL and self.num_complete < self.num_tasks:
            return
        self.last_line, seconds = now, now - self.start
        rates = [
            f", {count / 10**digits:.{digits // 3}f} {unit} ({count / seconds:,.0f}/s)"
            for count, digits, unit in (
                (self.documents, 0, "documents"),
                (self.tokens, 6, "M tokens"),
            )
            if count
        ]
        remaining = seconds / self.num_complete * (self.num_tasks - self.num_complete)
        log(
            f"  {self.label} {self.num_complete}/{self.num_tasks}{''.join(rates)}, "
            f"{remaining:.0f} s left"
        )


def run_with_progress(
    map_tasks: MapTasks, plan: Sequence[Any], work: Work, label: str
) -> list[TaskResult]:
    """The results of ``work`` in the plan's order, which is that of their ``number``."""
    progress = Progress(len(plan), label)
    results = []
    for result in map_tasks(plan, work):
        results.append(result)
        progress.add(result)
    return sorted(results, key=lambda result: result["number"])
