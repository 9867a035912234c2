"""Waits for conditions. Imports no torch, so that processes of a pool start quickly."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(
    condition: Callable[[], Any], seconds: float = 60.0, what: str = "it", every: float = 0.02
) -> None:
    """Waits until ``condition`` holds; fails, saying ``what``, when the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds} s")
        time.sleep(every)
