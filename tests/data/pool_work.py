"""Tasks of a pool's processes, which import this file and nothing that takes long."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from nanochat_ray.data.map_tasks import TaskResult
from tests.waiting import wait_for


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
    error = Path(folder) / "error"
    wait_for(lambda: len(os.listdir(folder)) > 1 if item == 0 else error.exists())
    if item == 0:
        raise ValueError("item 0")
    return {}


def die(item: Any) -> TaskResult:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}
