"""Work beside the requests of an engine that serves, in the same thread. No torch.

A job is a generator: each ``next`` is one step, such as one of another engine. Requests come first:

- While a request waits or its prompt is incomplete, no job has a turn. So the first token of a
  request that arrives waits for one step of a job at most.
- While requests are decoded, jobs get ``share`` of the time at most.
- While there is no request, jobs get all of it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any

from nanochat_ray.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Job:
    """A generator, what it has yielded so far, and a future of all that it will have yielded."""

    def __init__(self, steps: Generator[Any, None, None]):
        self._steps = steps
        self._items: list[Any] = []
        self.result: Future[list[Any]] = Future()
        """May be cancelled before the first step."""

    def _is_wanted(self) -> bool:
        return self.result.running() or self.result.set_running_or_notify_cancel()

    def advance(self) -> bool:
        """Takes a step; whether more may follow."""
        if not self._is_wanted():
            return False
        try:
            self._items.append(next(self._steps))
        except StopIteration:
            self.result.set_result(self._items)
        except BaseException as error:  # a panic in Rust is not an Exception
            logger.exception("a background job failed")
            self.result.set_exception(error)
        return not self.result.done()

    def end(self, error: BaseException) -> None:
        if self._is_wanted():
            self.result.set_exception(error)
        try:
            self._steps.close()
        except BaseException:
            logger.exception("a background job did not end cleanly")


class Background:
    """The jobs of an engine's thread, in order of their submission.

    The thread calls ``take_turn`` after each of its steps.
    """

    def __init__(self, share: float, clock: Callable[[], float] = time.perf_counter):
        self._share, self._clock = share, clock
        self._jobs: deque[Job] = deque()
        self._debt_s = 0.0
        """For how long requests must run before the next turn."""
        self._turn_end = 0.0

    @property
    def has_jobs(self) -> bool:
        return bool(self._jobs)

    def submit(self, steps: Generator[Any, None, None]) -> Future[list[Any]]:
        """The future has all that the generator yields. Any thread may call this."""
        job = Job(steps)
        self._jobs.append(job)
        return job.result

    def take_turn(self, scheduler: Scheduler) -> None:
        """A step of the first job, unless the requests of ``scheduler`` come first."""
        if not self._jobs or scheduler.has_prompts:
            return
        start = self._clock()
        is_early = start - self._turn_end < self._debt_s or not self._share
        if scheduler.running and is_early:
            return
        if not self._jobs[0].advance():
            self._jobs.popleft()
        self._turn_end = self._clock()
        if self._share:
            self._debt_s = (self._turn_end - start) * (1 / self._share - 1)

    def end(self, error: BaseException) -> None:
        """Ends all jobs."""
        while self._jobs:
            self._jobs.popleft().end(error)
