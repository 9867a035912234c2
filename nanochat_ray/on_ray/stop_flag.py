"""How the driver stops the workers. Imports nothing, so that the actor starts at once."""

from __future__ import annotations


class StopFlag:
    """An actor through which the driver tells the workers to stop."""

    def __init__(self) -> None:
        self._stop = False

    def stop(self) -> None:
        self._stop = True

    def is_stopping(self) -> bool:
        return self._stop
