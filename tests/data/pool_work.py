"""Tasks of a pool's processes, which import this file and nothing that takes long."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from nanochat_ray.data.map_tasks import TaskResult


def square(item: Any) -> TaskResult:
    return {"number": item, "square": item**2, "pid": os.getpid()}


def fail_on_three(item: Any) -> TaskResult:
    if item == 3:
        raise FileNotFoundError(2, "text file late.txt is missing")
    if item == 4:
        raise ValueError("text file late.txt is not text")
    return {"number": item}


def touch(folder: str, item: Any) -> TaskResult:
    """Item 0 fails once another task runs; the others wait until its error has come out."""
    (Path(folder) / str(item)).touch()
    deadline = time.monotonic() + 60
    while len(os.listdir(folder)) < 2 if item == 0 else not (Path(folder) / "error").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if item == 0:
        raise ValueError("item 0")
    return {}


def die(item: Any) -> TaskResult:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}
