"""What the process around a trainer sees and decides: a command line, Ray Train, a logger."""

from __future__ import annotations

from typing import Any, Protocol


class Hooks(Protocol):
    """Called by the ``Trainer``. The default of each method does nothing: override what is needed.

    A trainer takes several hooks: each gets every record, and one that wants to stop or to save is
    enough.
    """

    def on_record(self, record: dict[str, Any]) -> None:
        """Called on every rank with each record: a step, a validation, a sample, a checkpoint.

        Records are flat dicts of JSON values, as ``metrics.Metrics`` makes them.
        """
        return

    def should_stop(self) -> bool:
        """Called on every rank before each step. True on one rank stops all of them: they finish
        the step, save a checkpoint and return."""
        return False

    def should_save(self) -> bool:
        """Collective, with the same answer on every rank; called after a step, at most every
        ``trainer.POLL_INTERVAL_S`` seconds. True saves a checkpoint, and training continues."""
        return False

    def check_publish(self) -> None:
        """Called on rank 0 before anything is published. Raises if another process owns the run."""
        return

    def close(self) -> None:
        """Called once, when the trainer returns or raises."""
        return
