"""What a run measures of itself: a list of records, a summary, a file of JSON lines."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from nanochat_ray.train.step import StepResult

NORM_WINDOW = 100
"""Gradient norms that a checkpoint stores, for gradient-spike clipping."""
VAL_METRICS = ("bits_per_byte", "val_loss", "error_rate")
"""Metrics of validations, lower being better, one for each kind of source."""
_NUMBERS = {
    "train": (
        *("loss", "grad_norm", "lr_factor", "tokens", "seconds", "data_wait", "tokens_per_s"),
        "steps",
    ),
    "eval": ("seconds",),
    "save": ("stall",),
    "sample": (),
}
"""Fields of each kind of record that are numbers and that summary and report read."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _record(line: str) -> dict[str, Any] | None:
    """A line of metrics.jsonl, or None if it is not a record."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.get("kind") not in _NUMBERS:
        return None
    fields = ("step", *_NUMBERS[value["kind"]])
    if type(value.get("step")) is not int or not all(_is_number(value.get(f)) for f in fields):
        return None
    figures = [value[k] for k in (*VAL_METRICS, "mfu") if k in value]
    texts = [value.get(k) for k in ("prompt", "text")] if value["kind"] == "sample" else []
    valid = all(map(_is_number, figures)) and all(isinstance(text, str) for text in texts)
    return value if valid else None


def read_records(text: str) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; lines that are damaged are left out."""
    return [record for line in text.splitlines() if (record := _record(line)) is not None]


def duration(seconds: float) -> str:
    """``95`` → ``1:35``; hours come first if there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Metrics:
    """Records of a run in the order of their steps; each is a flat dict of JSON values."""

    def __init__(
        self,
        records: list[dict[str, Any]] | None = None,
        *,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
        bytes_per_token: float = 0.0,
    ):
        """``peak_flops`` is that of all workers together; 0 leaves the MFU out.

        ``bytes_per_token`` turns a training loss into bits per byte; 0 leaves them out.
        """
        self.records = records or []
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self.bytes_per_token = bytes_per_token
        self.start_clock(0)
        self._norms: list[float] = []
        self._best: tuple[int, float] | None = None

    def resume(self, text: str, trainer: dict[str, Any], *, before: int) -> list[str]:
        """Loads the log's records up to step ``before``; later ones are of repeated steps.

        What steps depend on comes from the checkpoint's ``trainer``. Returns one line if the log
        is damaged: then curves and totals lack what cannot be read.
        """
        lines, valid = text.splitlines(), read_records(text)
        self.records = [r for r in valid if r["step"] <= before]
        norms, best = trainer.get("grad_norms"), trainer.get("best")
        if isinstance(norms, list):
            self._norms = [float(norm) for norm in norms if _is_number(norm)]
        else:
            log_norms = (r["grad_norm"] for r in self.records if r["kind"] == "train")
            self._norms = [norm for norm in log_norms if math.isfinite(norm)][-NORM_WINDOW:]
        if isinstance(best, list) and len(best) == 2 and all(map(_is_number, best)):
            self._best = (int(best[0]), float(best[1]))
        num_steps = sum(r["kind"] == "train" for r in self.records)
        if len(valid) == len(lines) and num_steps >= before:
            return []
        return [
            f"metrics.jsonl has {len(lines) - len(valid)} damaged lines and {num_steps} of "
            f"{before} steps: curves and totals lack the rest"
        ]

    def state(self) -> dict[str, Any]:
        """What ``resume`` needs of a checkpoint for bitwise identical steps, without the log."""
        best = self.best()
        return {"grad_norms": self.grad_norms(NORM_WINDOW)[::-1], "best": list(best or ()) or None}

    def start_clock(self, steps: int) -> None:
        self._steps = steps
        self._timed_seconds, self._timed_steps = 0.0, 0

    def add(self, **record: Any) -> dict[str, Any]:
        record["time"] = round(time.time(), 3)
        self.records.append(record)
        return record

    def step(
        self,
        step: int,
        result: StepResult,
        *,
        seconds: float,
        data_wait: float,
        is_warmup: bool = False,
        **figures: float,
    ) -> dict[str, Any]:
        """``is_warmup``: the step compiled kernels or filled caches, and its time says nothing
        of the others; it has no MFU. ``figures`` are the batch's own."""
        if not is_warmup:
            self._timed_seconds += seconds
            self._timed_steps += 1
        tokens = result.tokens
        mean = self._timed_seconds / self._timed_steps if self._timed_steps else seconds
        if result.weights_updated and math.isfinite(result.grad_norm):
            self._norms = [*self._norms[1 - NORM_WINDOW :], result.grad_norm]
        optional: dict[str, float] = {"warmup": True} if is_warmup else {}
        if self.bytes_per_token:
            optional["bits_per_byte"] = result.loss / (math.log(2) * self.bytes_per_token)
        if self.peak_flops and not is_warmup:
            optional["mfu"] = tokens / seconds * self.flops_per_token / self.peak_flops
        return self.add(
            kind="train",
            step=step,
            steps=self._steps,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr_factor=result.lr_factor,
            skipped=not result.weights_updated,
            tokens=tokens,
            trained_tokens=result.trained_tokens,
            seconds=seconds,
            data_wait=data_wait,
            tokens_per_s=tokens / seconds,
            eta_s=mean * (self._steps - step),
            **optional,
            **figures,
            **result.metrics,
        )

    def grad_norms(self, last: int) -> list[float]:
        """Gradient norms of the last steps that moved the weights, the newest first."""
        return self._norms[::-1][:last]

    def best(self) -> tuple[int, float] | None:
        """Step and metric of the best validation."""
        metrics = [(r["step"], m) for r in self.records if (m := val_metric(r)) is not None]
        metrics += [self._best] if self._best else []
        return min(metrics, key=lambda pair: pair[1]) if metrics else None

    def summary(self) -> dict[str, Any]:
        """Last loss (smoothed over 20 steps), validations first, last and best, mean rate."""
        steps = [r for r in self.records if r["kind"] == "train"]
        evals = [r for r in self.records if r["kind"] == "eval"]
        summary: dict[str, Any] = {"tokens": sum(r["tokens"] for r in steps)}
        if steps:
            seconds = sum(r["seconds"] for r in steps)
            steady_steps = [r for r in steps if not r.get("warmup")] or steps
            num_tokens = sum(r["tokens"] for r in steady_steps)
            summary["loss"] = sum(r["loss"] for r in steps[-20:]) / len(steps[-20:])
            summary["tokens_per_s"] = num_tokens / sum(r["seconds"] for r in steady_steps)
            summary["data_wait_share"] = sum(r["data_wait"] for r in steps) / seconds
            summary["train_seconds"] = seconds
            if self.peak_flops:
                rate = summary["tokens_per_s"] * self.flops_per_token
                summary["mfu"] = rate / self.peak_flops
        if evals:
            keys = [k for k, v in evals[-1].items() if isinstance(v, float) and k != "time"]
            for key in set(keys) - {"seconds"}:
                summary[f"first_{key}"] = evals[0].get(key, math.nan)
                summary[key] = evals[-1][key]
                if key in VAL_METRICS:
                    summary[f"best_{key}"] = min(r.get(key, math.inf) for r in evals)
        saves = [r for r in self.records if r["kind"] == "save"]
        if saves:
            summary["saves"] = len(saves)
            summary["longest_save_stall_s"] = max(r["stall"] for r in saves)
        return summary


def to_jsonl(records: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def val_metric(record: dict[str, Any]) -> float | None:
    """A validation's metric (lower is better); None for another kind of record."""
    if record["kind"] != "eval":
        return None
    figures = (record[key] for key in VAL_METRICS if key in record)
    return next((figure for figure in figures), None)
