"""Graceful stop: SIGTERM (a scheduler takes the machine back) or Ctrl-C, once.

After the first signal the trainer finishes its step, saves a checkpoint and returns; the process
then exits with ``STOPPED``, which says that the same command resumes the run. A second signal has
its default effect.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

STOPPED = 75
"""Exit status of a job that was stopped early with a checkpoint: EX_TEMPFAIL, "try again"."""


class StopOnSignal:
    """While entered, ``stop`` is set by the first of ``signals``. Main thread only."""

    def __init__(self, *signals: signal.Signals):
        self.signals = signals or (signal.SIGTERM, signal.SIGINT)
        self.stop = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in self.signals:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.stop.set()
        self._restore()
        print(
            f"{signal.Signals(number).name}: a checkpoint after this step, then the end; "
            "once more ends at once",
            file=sys.stderr,
            flush=True,
        )
