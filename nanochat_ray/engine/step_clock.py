"""Tells a step that hangs, in a kernel for example, from one that takes long."""

from __future__ import annotations

import time

SLOW_FACTOR = 4.0
"""A step may take this many times as long as the longest one before it."""
FIRST_FACTOR = 10.0
"""A step with more tokens than any before it may take this many times the limit: it may be a long
prompt, or compile a kernel."""


class StepClock:
    """Times the steps of one engine. One thread begins and ends them, any calls ``is_hung``."""

    def __init__(self) -> None:
        self._start: float | None = None
        self._longest = 0.0
        self._most_tokens = 0

    def begin(self) -> None:
        self._start = time.monotonic()

    def end(self, num_tokens: int) -> None:
        """The step of ``num_tokens`` is complete."""
        if self._start is not None:
            self._longest = max(self._longest, time.monotonic() - self._start)
        self._most_tokens = max(self._most_tokens, num_tokens)
        self._start = None

    def cancel(self) -> None:
        """The step has failed: its time says nothing of others."""
        self._start = None

    def is_hung(self, limit_s: float, num_tokens: int) -> bool:
        """Whether the current step, of ``num_tokens``, takes longer than a sound one may."""
        start = self._start
        if start is None:
            return False
        limit = max(limit_s, SLOW_FACTOR * self._longest)
        if num_tokens > self._most_tokens:
            limit *= FIRST_FACTOR
        return time.monotonic() - start > limit
