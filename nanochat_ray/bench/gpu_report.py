"""What ``bench gpu`` shares: results by name, and time on the device."""

from __future__ import annotations

import gc
import importlib
import itertools
import json
import statistics
import sys
import time
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

UNUSED_PACKAGES = (
    *("llguidance", "llguidance.numpy", "llguidance.gbnf_to_lark"),
    *("pyarrow", "pyarrow.fs", "pyarrow.ipc", "pyarrow.parquet", "pyarrow.compute"),
    *("psutil", "msgpack", "tiktoken", "tiktoken.core", "regex"),
    *("obstore", "obstore.store"),
)
"""Packages that the engine and the trainer import, but that nothing here calls."""


class _Nothing:
    def __init__(self, *args: Any, **kwargs: Any):
        """Of any class of a missing package."""


class _EmptyModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing


def replace_missing_packages() -> None:
    """Puts empty modules in place of ``UNUSED_PACKAGES`` that are not installed, so that torch and
    numpy are enough to measure a GPU. Before anything else of this project is imported."""
    for name in UNUSED_PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = _EmptyModule(name)


@dataclass
class Report:
    """Figures by name, and what was wrong."""

    match: str = ""
    """Only the parts whose names contain this run."""
    max_seconds: float = 0.0
    """Parts that would begin later than this are left out; 0: none."""
    path: Path | None = None
    """Where the figures are written after each part, as JSON."""
    values: dict[str, str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    parts: set[str] = field(default_factory=set)
    """Names of those that ran or were left out: none runs twice."""
    start: float = field(default_factory=time.perf_counter)

    def note(self, name: str, value: object) -> None:
        self.values[name] = str(value)
        print(f"{name:<64} {value}", flush=True)

    def check(self, name: str, value: float, most: float) -> None:
        """``value`` must not exceed ``most``."""
        is_good = value <= most  # false for NaN
        if not is_good:
            self.failures.append(name)
        self.note(name, f"{value:.2e} (at most {most:.0e}) {'ok' if is_good else 'WRONG'}")

    def check_equal(self, name: str, value: object, reference: object) -> None:
        if value != reference:
            self.failures.append(name)
        self.note(name, f"{value} of {reference} {'ok' if value == reference else 'WRONG'}")

    def part(self, name: str, run: Callable[..., object], *args: Any, **kwargs: Any) -> None:
        """Calls ``run``, whose errors end this part alone."""
        import torch

        if self.match not in name or name in self.parts:
            return
        self.parts.add(name)
        start = time.perf_counter()
        if 0 < self.max_seconds < start - self.start:
            self.note(f"left out {name}", f"{self.max_seconds:.0f} s are over")
            return
        try:
            run(*args, **kwargs)
        except Exception as error:
            traceback.print_exc(limit=-4)
            self.failures.append(name)
            self.note(f"CRASH {name}", f"{type(error).__name__}: {str(error)[:300]}")
        finally:
            gc.collect()
            torch.cuda.empty_cache()
            print(f"   ({name}: {time.perf_counter() - start:.0f} s)", flush=True)
            self.write()

    def write(self) -> None:
        if self.path is not None:
            figures = {"values": self.values, "failures": self.failures}
            self.path.write_text(json.dumps(figures, indent=1))


def device_ms(run: Callable[[], object], count: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of ``run`` on the device."""
    import torch

    for _ in range(warmup):
        run()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for event in events[:-1]:
        event.record()
        run()
    events[-1].record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(events)
    return statistics.median(first.elapsed_time(second) for first, second in pairs)


def relative_error(value: Any, reference: Any) -> float:
    """‖value - reference‖ / ‖reference‖, in float64 on the CPU."""
    value, reference = (tensor.detach().double().cpu() for tensor in (value, reference))
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))
