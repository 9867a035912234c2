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


def wait_until_idle(engine: Any) -> None:
    """Waits until an engine that another thread runs has no work and no leak. That
    thread removes a sequence before it frees the slot: a look between the two is no leak."""

    def is_idle() -> bool:
        try:
            engine.check_integrity()
        except AssertionError:
            return False
        return not engine.has_work

    wait_for(is_idle, what="an idle engine that has lost nothing")
