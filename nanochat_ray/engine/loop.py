"""A thread that steps an engine, so that other threads can submit and abort at any time."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

from torch import Tensor

from nanochat_ray.engine.background import Background
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.queue_limit import QueueLimit
from nanochat_ray.engine.request import (
    WEIGHTS_REPLACED,
    EngineFull,
    EngineStoppedError,
    Request,
    RequestOutput,
    WeightsReplacedError,
)
from nanochat_ray.engine.stats import Stats
from nanochat_ray.engine.step_clock import StepClock

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Steps in a row that may raise before the loop gives up."""


@dataclass(eq=False)
class WeightSwap:
    """New weights, until the engine has them."""

    weights: Mapping[str, Tensor]
    version: str
    deadline: float
    """When (``time.monotonic``) the requests that still run are ended."""
    completion: Future[None] = field(default_factory=Future)


class EngineLoop:
    """Owns an engine and the one thread that touches it.

    ``on_step`` is called in that thread once for each step that has outputs, with all of them.
    Every request that ``submit`` accepted gets exactly one output with ``finish``, also when a step
    raises ("error") or the loop is stopped ("abort"). ``niceness`` is what the thread, and those
    that it starts, have more than this process.
    """

    def __init__(
        self, engine: Engine, on_step: Callable[[list[RequestOutput]], None], niceness: int = 0
    ):
        self._engine, self._on_step, self._niceness = engine, on_step, niceness
        self._condition = threading.Condition()
        # Under the condition:
        self._inbox: list[tuple[Request, Future[Any] | None]] = []
        """Each with its compiled grammar, which stays cached while it is referenced."""
        self._num_arriving = 0
        """Requests between the inbox and the scheduler, which count as waiting too."""
        self._aborts: list[str] = []
        self._requests: set[str] = set()
        """Ids, until the last output."""
        self._limit = QueueLimit(engine)
        self._background = Background(engine.config.background_share)
        self._swap: WeightSwap | None = None
        """While it waits, requests stay in the inbox unless they need the old weights."""
        self._version = engine.weight_version
        self._clock, self._job_clock = StepClock(), StepClock()
        self._stopping = self._dropping = False
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def failure(self) -> str | None:
        """Why the loop has ended, or None while it runs."""
        return self._failure

    @property
    def weight_version(self) -> str:
        """Of the weights that a new request gets (``Engine.weight_version``)."""
        return self._version

    @property
    def is_swapping(self) -> bool:
        """Whether new requests wait for new weights."""
        return self._swap is not None

    def is_hung(self, limit_s: float) -> bool:
        """Whether a step takes longer than ``limit_s`` and than a sound one may (``StepClock``)."""
        # Any step of a job may compile a kernel.
        is_job_hung = self._job_clock.is_hung(limit_s, sys.maxsize)
        return is_job_hung or self._clock.is_hung(limit_s, self._engine.num_step_tokens)

    def swap_weights(
        self, weights: Mapping[str, Tensor], version: str, drain_s: float
    ) -> Future[None]:
        """Replaces the weights (``Engine.load_weights``); the result is there when that is done.

        Requests that have begun finish on the old weights; new ones wait. After ``drain_s`` seconds
        those that still run end with an error (``WEIGHTS_REPLACED``), unless they have no output
        yet: they begin again with the new weights. ValueError names a tensor that does not fit;
        RuntimeError if another swap is not done, EngineStoppedError as ``submit``.
        """
        self._engine.check_weights(weights)
        swap = WeightSwap(weights, version, time.monotonic() + drain_s)
        swap.completion.set_running_or_notify_cancel()  # the swap happens though nobody waits
        with self._condition:
            self._check_alive()
            if self._swap is not None:
                raise RuntimeError(f"the engine is still loading {self._swap.version}")
            self._swap = swap
            self._condition.notify()
        return swap.completion

    def run_in_background(self, steps: Generator[Any, None, None]) -> Future[list[Any]]:
        """What the generator yields, one step at a time beside the requests (``Background``).
        EngineStoppedError, here or from the future, if the loop has ended or is stopping."""
        with self._condition:
            self._check_alive()
            self._condition.notify()
            return self._background.submit(steps)

    def prepare(self, request: Request) -> Future[Any] | None:
        """What ``submit`` would wait for: the compilation of the grammar; None without one.
        EngineFull if the request would be refused then."""
        if request.params.grammar is None:
            return None
        self._check_queue(request)
        return self._engine.prepare(request)

    def submit(self, request: Request) -> None:
        """Raises ValueError (the engine can never process it), EngineFull, WeightsReplacedError, or
        EngineStoppedError (the loop has ended or is stopping)."""
        preparation = self.prepare(request)
        self._engine.validate(request)
        with self._condition:
            self._check_alive()
            if request.weight_version not in ("", self._version):
                raise WeightsReplacedError(
                    f"{WEIGHTS_REPLACED} {request.weight_version} is not served any more, but "
                    f"{self._version}"
                )
            if request.id in self._requests:
                raise ValueError(f"id={request.id!r} is in use by another request")
            wait_s = self._check_queue(request)
            if wait_s:
                self._limit.expect(request, wait_s)
            self._requests.add(request.id)
            self._inbox.append((request, preparation))
            self._condition.notify()

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineStoppedError(f"the engine is dead: {self._failure}")
        if self._stopping:
            raise EngineStoppedError("the engine is stopping")

    def _check_queue(self, request: Request) -> float:
        arrivals = [r for r, _ in list(self._inbox)]
        return self._limit.check(request, arrivals, self._num_arriving)

    def abort(self, request_id: str) -> None:
        """Its slot is free before the next step; an unknown id is ignored."""
        with self._condition:
            self._aborts.append(request_id)
            self._condition.notify()

    def stats(self) -> Stats:
        """A step may run at the same time: good for metrics, not for decisions."""
        stats = self._engine.stats()
        stats.waiting += len(self._inbox)
        return stats

    def stop(self, deadline: float = 0.0) -> None:
        """Rejects new requests, waits ``deadline`` seconds for the others, aborts the rest and ends
        the thread. RuntimeError if the thread does not end."""
        until = time.monotonic() + deadline
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._requests, timeout=deadline)
            self._dropping = True
        if self._thread.ident is not None:
            self._thread.join(timeout=max(0.0, until - time.monotonic()) + 30)
            if self._thread.is_alive():
                raise RuntimeError("the engine's thread hangs in a step")

    def _run(self) -> None:
        if self._niceness and sys.platform == "linux":  # elsewhere threads have none of their own
            now = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), now + self._niceness)
        failures = 0
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: (
                        self._inbox
                        or self._aborts
                        or self._stopping
                        or self._swap
                        or self._engine.has_work
                        or self._background.has_jobs
                    )
                )
                inbox = self._take_inbox()
                self._num_arriving = len(inbox)
                aborts, self._aborts = self._aborts, []
                if self._dropping or (self._stopping and not self._requests):
                    break
            try:
                outputs = (
                    self._apply(inbox, aborts) + self._advance_swap() + self._limit.refuse_late()
                )
                self._clock.begin()
                outputs += self._engine.step()
                self._clock.end(self._engine.num_step_tokens)
                failures = 0
            except BaseException as error:  # a panic in Rust is not an Exception
                logger.exception("a step of the engine failed")
                self._clock.cancel()
                failures += 1
                outputs = self._fail(f"{type(error).__name__}: {error}")
                if failures >= MAX_FAILURES:
                    self._failure = f"{failures} steps in a row failed, the last with {error!r}"
            self._deliver(outputs)
            if self._failure is not None:
                self._deliver(self._fail(self._failure))
                self._end_others()
                return
            # A request that has arrived meanwhile is no prompt of the scheduler yet.
            if self._background.has_jobs and not self._inbox:
                self._job_clock.begin()
                self._background.take_turn(self._engine.scheduler)
                self._job_clock.end(0)
        self._end_others()
        self._engine.reset()
        with self._condition:
            request_ids = sorted(self._requests)
        self._deliver([RequestOutput(request_id=i, finish="abort") for i in request_ids])

    def _take_inbox(self) -> list[tuple[Request, Future[Any] | None]]:
        """The requests that the engine may have now, and those that are aborted."""
        entries, self._inbox = self._inbox, []
        if self._swap is None:
            return entries
        aborts = set(self._aborts)
        waits = [not (r.weight_version or r.id in aborts) for r, _ in entries]
        self._inbox = list(compress(entries, waits))
        return [entry for entry, must_wait in zip(entries, waits, strict=True) if not must_wait]

    def _advance_swap(self) -> list[RequestOutput]:
        """Loads new weights once no request needs the old ones; returns the outputs of requests
        that this ends."""
        swap = self._swap
        if swap is None:
            return []
        outputs: list[RequestOutput] = []
        requests = self._engine.withdraw_waiting()
        if self._engine.has_work and time.monotonic() >= swap.deadline:
            others, outputs = self._engine.interrupt(
                f"{WEIGHTS_REPLACED} {self._version} was replaced by {swap.version} before the "
                "answer was complete: send the request again"
            )
            requests += others
        with self._condition:
            self._inbox[:0] = [(request, None) for request in requests]
            needs_old = any(request.weight_version for request, _ in self._inbox)
            if self._engine.has_work or needs_old:
                return outputs
            self._swap, self._version = None, swap.version
        try:
            self._engine.load_weights(swap.weights, swap.version)
        except BaseException as error:
            swap.completion.set_exception(error)
            raise
        swap.completion.set_result(None)
        return outputs

    def _end_others(self) -> None:
        """Ends the swap and the background jobs that the loop will not do."""
        with self._condition:
            swap, self._swap = self._swap, None
        if swap is not None:
            swap.completion.set_exception(RuntimeError("the engine has ended"))
        self._background.end(EngineStoppedError("the engine has ended"))

    def _apply(
        self, inbox: list[tuple[Request, Future[Any] | None]], aborts: list[str]
    ) -> list[RequestOutput]:
        rejections = []
        for request, _ in inbox:
            try:
                self._engine.add(request)
            except Exception as error:  # other requests continue
                reason = str(error)
                if not isinstance(error, ValueError | EngineFull):
                    logger.exception("request %s cannot be added", request.id)
                    reason = f"{type(error).__name__}: {error}"
                rejections.append(
                    RequestOutput(request_id=request.id, finish="error", error=reason)
                )
            finally:
                self._num_arriving -= 1
        for request_id in aborts:
            self._engine.abort(request_id)
        return rejections

    def _fail(self, reason: str) -> list[RequestOutput]:
        """Finishes every request with an error."""
        self._engine.reset()
        with self._condition:
            request_ids, self._inbox = sorted(self._requests), []
        return [RequestOutput(request_id=i, finish="error", error=reason) for i in request_ids]

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        if not outputs:
            return
        with self._condition:
            for output in outputs:
                self._limit.note(output)
                if output.finish is not None:
                    self._requests.discard(output.request_id)
            if not self._requests:
                self._condition.notify_all()
        try:
            self._on_step(outputs)
        except Exception as error:
            logger.exception("the receiver of the engine's outputs failed")
            self._failure = f"its receiver failed with {error!r}"
