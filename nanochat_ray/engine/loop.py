"""A thread that steps an engine, so that other threads can submit and abort at any time."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.request import EngineFull, Request, RequestOutput
from nanochat_ray.engine.stats import Stats

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Steps in a row that may raise before the loop gives up."""


class EngineLoop:
    """Owns an engine and the one thread that touches it.

    ``on_step`` is called in that thread once for each step that has outputs, with all of them.
    Every request that ``submit`` accepted gets exactly one output with ``finish``, also when a step
    raises ("error") or the loop is stopped ("abort").
    """

    def __init__(self, engine: Engine, on_step: Callable[[list[RequestOutput]], None]):
        self._engine, self._on_step = engine, on_step
        self._condition = threading.Condition()
        # Under the condition:
        self._inbox: list[tuple[Request, Future[Any] | None]] = []
        """Each with its compiled grammar, which stays cached while it is referenced."""
        self._num_arriving = 0
        """Requests between the inbox and the scheduler, which count as waiting too."""
        self._aborts: list[str] = []
        self._ids: set[str] = set()
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
        return self._engine.weight_version

    def prepare(self, request: Request) -> Future[Any] | None:
        """What ``submit`` would wait for: the compilation of the grammar; None without one."""
        return self._engine.prepare(request)

    def submit(self, request: Request) -> None:
        """Raises ValueError (the engine can never process it), EngineFull, or RuntimeError (the
        loop has ended or is stopping)."""
        preparation = self._engine.prepare(request)
        self._engine.validate(request)
        with self._condition:
            if self._failure is not None:
                raise RuntimeError(f"the engine is dead: {self._failure}")
            if self._stopping:
                raise RuntimeError("the engine is stopping")
            if request.id in self._ids:
                raise ValueError(f"id={request.id!r} is in use by another request")
            if self._engine.scheduler.queue_capacity - self._num_arriving - len(self._inbox) <= 0:
                waiting = self._engine.config.max_queue_size
                raise EngineFull(f"max_queue_size={waiting} requests are waiting already")
            self._ids.add(request.id)
            self._inbox.append((request, preparation))
            self._condition.notify()

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
            self._condition.wait_for(lambda: not self._ids, timeout=deadline)
            self._dropping = True
            self._condition.notify_all()
        if self._thread.ident is not None:
            self._thread.join(timeout=max(0.0, until - time.monotonic()) + 30)
            if self._thread.is_alive():
                raise RuntimeError("the engine's thread hangs in a step")

    def _run(self) -> None:
        failures = 0
        while True:
            with self._condition:
                self._condition.wait_for(
                    lambda: self._inbox or self._aborts or self._stopping or self._engine.has_work
                )
                inbox, self._inbox = self._inbox, []
                self._num_arriving = len(inbox)
                aborts, self._aborts = self._aborts, []
                if self._dropping or (self._stopping and not self._ids):
                    break
            try:
                outputs = self._apply(inbox, aborts) + self._engine.step()
                failures = 0
            except BaseException as error:  # a panic in Rust is not an Exception
                logger.exception("a step of the engine failed")
                failures += 1
                outputs = self._fail(f"{type(error).__name__}: {error}")
                if failures >= MAX_FAILURES:
                    self._failure = f"{failures} steps in a row failed, the last with {error!r}"
            self._deliver(outputs)
            if self._failure is not None:
                self._deliver(self._fail(self._failure))
                return
        self._engine.reset()
        with self._condition:
            request_ids = sorted(self._ids)
        self._deliver([RequestOutput(request_id=i, finish="abort") for i in request_ids])

    def _apply(
        self, inbox: list[tuple[Request, Future[Any] | None]], aborts: list[str]
    ) -> list[RequestOutput]:
        rejections = []
        for request, _ in inbox:
            try:
                self._engine.add(request)
            except (ValueError, EngineFull) as error:
                rejections.append(
                    RequestOutput(request_id=request.id, finish="error", error=str(error))
                )
            except Exception as error:  # other requests continue
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
            request_ids, self._inbox = sorted(self._ids), []
        return [RequestOutput(request_id=i, finish="error", error=reason) for i in request_ids]

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        if not outputs:
            return
        with self._condition:
            self._ids.difference_update(o.request_id for o in outputs if o.finish)
            if not self._ids:
                self._condition.notify_all()
        try:
            self._on_step(outputs)
        except Exception as error:
            logger.exception("the receiver of the engine's outputs failed")
            self._failure = f"its receiver failed with {error!r}"
