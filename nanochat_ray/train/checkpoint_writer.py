"""Writes checkpoints in a thread, again and again while storage fails, and only ever the newest."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nanochat_ray.retry import backoff, reason

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class PendingCheckpoint:
    """What a checkpoint is written from: a copy, which training does not change."""

    name: str
    write: Callable[[], None]
    """Raises OSError if storage fails; may be called again then."""
    is_validated: bool = False
    """Whether it may be the best one: then no periodic one replaces it."""
    time: float = field(default_factory=time.time)
    """When it was taken, in seconds since the epoch."""


class CheckpointWriter:
    """One checkpoint at a time. While it cannot be written it stays in memory, until a newer one
    takes its place. Errors other than OSError are final."""

    def __init__(self, delays: Callable[[], Iterator[float]] = backoff):
        self._delays = delays
        self._condition = threading.Condition()
        # Under the condition:
        self._pending: PendingCheckpoint | None = None
        self._thread: threading.Thread | None = None
        self._is_waiting = False
        """Between two attempts to write the checkpoint."""
        self._is_on_hold = False
        """No attempt to write begins."""
        self._first_failure: float | None = None
        """When (``time.time``) storage failed first since the last success."""
        self._deadline: float | None = None
        """When (``time.monotonic``) to give up."""
        self._error: BaseException | None = None
        self.last_time: float | None = None
        """When the last checkpoint that is written was taken, in seconds since the epoch."""

    def hold(self) -> bool:
        """Whether a periodic checkpoint may be put now: there is none, or one that storage refused
        and that is no candidate for the best.

        If so no attempt to write begins until ``put`` or ``release``: a storage that does not
        answer would keep the new checkpoint, and the training with it, waiting.
        """
        with self._condition:
            pending = self._pending
            self._is_on_hold = pending is None or (self._is_waiting and not pending.is_validated)
            return self._is_on_hold

    def release(self) -> None:
        """Undoes ``hold``."""
        with self._condition:
            self._is_on_hold = False
            self._condition.notify_all()

    @property
    def has_error(self) -> bool:
        """``await_attempt`` would raise."""
        return self._error is not None

    @property
    def delay_s(self) -> float:
        """Seconds for which storage has been failing; 0 if it does not."""
        failure = self._first_failure
        return 0.0 if failure is None else max(0.0, time.time() - failure)

    @property
    def pending_s(self) -> float:
        """Seconds since the checkpoint was taken that is not written yet; 0 if there is none."""
        pending = self._pending
        return 0.0 if pending is None else max(0.0, time.time() - pending.time)

    def await_attempt(self) -> None:
        """Returns when no attempt to write runs, so that ``put`` may be called; drops a checkpoint
        that could not be written. Raises the error of a write that failed for good."""
        with self._condition:
            self._condition.wait_for(lambda: self._pending is None or self._is_waiting)
            self._raise_error()
            self._pending = None

    def put(self, pending: PendingCheckpoint) -> None:
        """To be written as soon as storage allows it."""
        with self._condition:
            assert self._pending is None
            self._pending, self._is_on_hold = pending, False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="checkpoint")
                self._thread.start()
            self._condition.notify_all()

    def await_end(self, timeout_s: float) -> None:
        """Returns when the checkpoint is written. Raises OSError, which names it, if storage still
        fails after ``timeout_s`` seconds; a write that proceeds may take longer."""
        with self._condition:
            self._deadline, self._is_on_hold = time.monotonic() + timeout_s, False
            self._condition.notify_all()
            self._condition.wait_for(lambda: self._pending is None)
            self._deadline = None
            self._raise_error()

    def give_up(self) -> None:
        """Ends the thread at the next failure of storage: nobody waits for the checkpoint."""
        with self._condition:
            self._deadline, self._is_on_hold = time.monotonic(), False
            self._condition.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _run(self) -> None:
        delays = self._delays()
        while (pending := self._next()) is not None:
            try:
                pending.write()
            except OSError as error:
                self._on_failure(pending, error, next(delays))
            except BaseException as error:  # raised in the trainer's thread
                self._end(pending, error)
            else:
                delays = self._delays()
                self._end(pending, None)

    def _next(self) -> PendingCheckpoint | None:
        with self._condition:
            if self._pending is None:
                self._thread = None
            return self._pending

    def _end(self, pending: PendingCheckpoint, error: BaseException | None) -> None:
        with self._condition:
            if error is None:
                self.last_time = pending.time
                if self._first_failure is not None:
                    late = time.time() - pending.time
                    _LOG.warning("%s is written, %.0f s late", pending.name, late)
            self._first_failure = None
            self._pending, self._error = None, error
            self._condition.notify_all()

    def _on_failure(self, pending: PendingCheckpoint, error: OSError, delay: float) -> None:
        with self._condition:
            if self._first_failure is None:
                self._first_failure = time.time()
                _LOG.warning(
                    "%s cannot be written; training continues, and it is tried again: %s",
                    *(pending.name, reason(error)),
                )
            self._is_waiting = True
            self._condition.notify_all()
            end = time.monotonic() + delay
            while not self._is_late and (self._is_on_hold or time.monotonic() < end):
                times = [] if self._is_on_hold else [end]
                times += [] if self._deadline is None else [self._deadline]
                # What has no end is ended by a notification.
                self._condition.wait(max(0.0, min(times) - time.monotonic()) if times else None)
            self._is_waiting = False
            if self._is_late and self._pending is not None:
                self._end(self._pending, self._final_error(self._pending, error))

    @property
    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _final_error(self, pending: PendingCheckpoint, error: OSError) -> OSError:
        text = f"{pending.name} could not be written for {self.delay_s:.0f} s: {reason(error)}"
        if error.errno is None:
            return OSError(text)
        # The kind of error decides whether the run is started again.
        return OSError(error.errno, text)
