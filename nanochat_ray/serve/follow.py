"""Follows a run: a thread looks for checkpoints (``checkpoint.follow``) and rolls them out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from nanochat_ray.checkpoint.follow import CheckpointWatcher, NewCheckpoint

POLL_S = 0.5
RETRY_S = 10.0
"""After an error that nobody expected."""
logger = logging.getLogger(__name__)


class Follower:
    """``roll`` makes the endpoint serve a checkpoint, and returns when every engine does.

    It raises ValueError for one that the engines refuse, RuntimeError if it cannot be done now, or
    OSError while they cannot read it: then it is called again.
    """

    def __init__(
        self,
        watcher: CheckpointWatcher,
        roll: Callable[[NewCheckpoint], None],
        check: Callable[[], None] = lambda: None,
    ):
        """``check`` is called when there is nothing to roll out."""
        self.watcher = watcher
        self._roll, self._check = roll, check
        self._end = threading.Event()
        self._has_warned = False
        self._thread = threading.Thread(target=self._run, name="follow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        self.watcher.close()

    def status(self) -> dict[str, Any]:
        return self.watcher.status()

    def _run(self) -> None:
        wait_s = POLL_S
        while not self._end.wait(wait_s):
            wait_s = POLL_S
            try:
                self.step()
            except Exception:
                # Without this thread the endpoint would stay with its weights and not say so.
                logger.exception("run %s cannot be followed", self.watcher.run.uri)
                wait_s = RETRY_S

    def step(self) -> None:
        """Rolls out the next checkpoint, if there is one."""
        try:
            new = self.watcher.poll()
            if new is None:
                self._check()
            else:
                self._roll_out(new)
        except OSError as error:
            if not self._has_warned:
                logger.warning("run %s cannot be read: %s", self.watcher.run.uri, error)
            self._has_warned = True
        else:
            self._has_warned = False

    def _roll_out(self, new: NewCheckpoint) -> None:
        try:
            self._roll(new)
        except (ValueError, RuntimeError) as error:
            self.watcher.refuse(new.about.name, f"it cannot be rolled out: {error}")
        else:
            self.watcher.accept(new)
