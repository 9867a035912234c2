"""What a run measures of itself: a list of records, a progress line, a file of JSON lines."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from nanochat_ray.train.step import StepResult


def duration(seconds: float) -> str:
    """``95`` → ``1:35``; hours come first if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Metrics:
    """Records of a run in the order of their steps; each is a flat dict of JSON values."""

    def __init__(self, records: list[dict[str, Any]] | None = None):
        self.records = records or []
        self._first = self._steps = 0
        self._spent = 0.0
        self._counted = 0

    @classmethod
    def from_jsonl(cls, text: str, *, before: int) -> Metrics:
        """The records up to step ``before``; later ones belong to steps that will be repeated."""
        records = [json.loads(line) for line in text.splitlines()]
        return cls([r for r in records if r["step"] <= before])

    def to_jsonl(self) -> str:
        return "".join(json.dumps(record) + "\n" for record in self.records)

    def start_clock(self, first: int, steps: int) -> None:
        self._first, self._steps = first, steps
        self._spent, self._counted = 0.0, 0

    def add(self, **record: Any) -> dict[str, Any]:
        record["time"] = round(time.time(), 3)
        self.records.append(record)
        return record

    def step(
        self, step: int, result: StepResult, *, seconds: float, waited: float, tokens: int
    ) -> dict[str, Any]:
        # The first step after a start warms caches up and would spoil the rate.
        if step > self._first + 1:
            self._spent += seconds
            self._counted += 1
        mean = self._spent / self._counted if self._counted else seconds
        return self.add(
            kind="train",
            step=step,
            steps=self._steps,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr_factor=result.lr_factor,
            skipped=not result.applied,
            tokens=tokens,
            trained_tokens=result.trained_tokens,
            seconds=seconds,
            data_wait=waited,
            tokens_per_s=tokens / seconds,
            eta_s=mean * (self._steps - step),
        )

    def summary(self) -> dict[str, Any]:
        """Last loss (smoothed over 20 steps), validations first, last and best, mean rate."""
        steps = [r for r in self.records if r["kind"] == "train"]
        evals = [r for r in self.records if r["kind"] == "eval"]
        summary: dict[str, Any] = {"tokens": sum(r["tokens"] for r in steps)}
        if steps:
            seconds = sum(r["seconds"] for r in steps)
            summary["loss"] = sum(r["loss"] for r in steps[-20:]) / len(steps[-20:])
            summary["tokens_per_s"] = summary["tokens"] / seconds
            summary["data_wait_share"] = sum(r["data_wait"] for r in steps) / seconds
            summary["train_seconds"] = seconds
        if evals:
            keys = [k for k, v in evals[-1].items() if isinstance(v, float) and k != "time"]
            for key in set(keys) - {"seconds"}:
                summary[f"first_{key}"] = evals[0].get(key, math.nan)
                summary[key] = evals[-1][key]
                summary[f"best_{key}"] = min(r.get(key, math.inf) for r in evals)
        return summary


def progress_line(record: dict[str, Any]) -> str:
    """One line a person reads: step, loss, rate, data wait and time left, or a validation."""
    if record["kind"] == "eval":
        found = {k: v for k, v in record.items() if k not in ("kind", "step", "time", "seconds")}
        values = "  ".join(f"{key} {value:.4f}" for key, value in found.items())
        return f"step {record['step']}  validation: {values}  ({record['seconds']:.1f} s)"
    wait = record["data_wait"] / record["seconds"]
    return (
        f"step {record['step']}/{record['steps']}  loss {record['loss']:.4f}  "
        f"norm {record['grad_norm']:.2f}  lr ×{record['lr_factor']:.2f}  "
        f"{record['tokens_per_s']:,.0f} tokens/s  data wait {wait:.1%}  "
        f"left {duration(record['eta_s'])}" + ("  SKIPPED: not finite" if record["skipped"] else "")
    )
