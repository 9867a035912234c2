"""Cores and memory of this machine, or of its container if that has less (cgroup v2). No torch."""

from __future__ import annotations

import math
import os
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def cores(folder: Path = CGROUP) -> int:
    """Cores that this process may use."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (folder / "cpu.max").read_text().split()
        return mine if quota == "max" else max(1, min(mine, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return mine


def total_memory(folder: Path = CGROUP) -> int:
    """Bytes."""
    total = int(psutil.virtual_memory().total)
    try:
        limit = (folder / "memory.max").read_text().strip()
        return total if limit == "max" else min(total, int(limit))
    except (OSError, ValueError):
        return total


def free_memory(folder: Path = CGROUP) -> int:
    """Bytes that can still be allocated."""
    free = int(psutil.virtual_memory().available)
    try:
        limit = (folder / "memory.max").read_text().strip()
        usage = int((folder / "memory.current").read_text())
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        # Cached files count as used, but are evicted on demand.
        evictable = int(stats.get("inactive_file", 0))
        return free if limit == "max" else min(free, int(limit) - usage + evictable)
    except (OSError, ValueError):
        return free
