"""The memory that is free: of a GPU, or of this machine or container."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch


def free_memory(device: torch.device, sharing: int = 1) -> int:
    """Bytes that a process may take of its GPU, or its part of this machine or container.

    ``sharing`` is how many processes share this machine's memory.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    return min(free, _container_memory(Path("/sys/fs/cgroup"), free)) // max(1, sharing)


def _container_memory(folder: Path, unlimited: int) -> int:
    """What the limit of a container (cgroup v2) leaves; ``unlimited`` where there is none."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        used = int((folder / "memory.current").read_text())
        stats = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return unlimited
    # Cached files count as used, but make room for whoever asks.
    return unlimited if limit == "max" else int(limit) - used + int(stats.get("inactive_file", 0))
