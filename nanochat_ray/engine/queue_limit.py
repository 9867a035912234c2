"""Keeps the queue of an engine as short as ``max_queue_size`` and ``max_queue_s`` say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.request import EngineFull, Request, RequestOutput

LATE = 1.1
"""Times ``max_queue_s`` that a request may wait in fact. The estimate was wrong then, such as when
other processes take the processor."""
HOPELESS = 1.3
"""Times ``max_queue_s`` from which a request is refused that has not waited as long yet but will,
by a new estimate: the engine has become slower. More than ``LATE``, as estimates vary."""
ESTIMATE_S = 0.1
"""Between such estimates: one takes as long as a part of a step."""


@dataclass(frozen=True)
class ExpectedWait:
    submit_time: float
    first_token_s: float


class QueueLimit:
    """Refuses requests, and measures how long the others wait.

    Any thread may ``check``; the rest is called with the lock of the loop, or in its thread.
    """

    def __init__(self, engine: Engine):
        self._engine = engine
        self._expectations: dict[str, ExpectedWait] = {}
        """By id: of requests that have to wait and have no output yet."""
        self._next_estimate = 0.0
        """Time (``time.monotonic``) from which waits are estimated again."""

    def check(self, request: Request, arrivals: Sequence[Request], num_arriving: int) -> float:
        """For how long it must wait, as estimated. EngineFull if too many wait or it would take too
        long (``max_queue_s``). A request that has output is never refused: its client reads
        already. ``arrivals``, and ``num_arriving`` more, are not in the scheduler yet."""
        if request.output_token_ids:
            return 0.0
        scheduler, config = self._engine.scheduler, self._engine.config
        wait_s = self._engine.queue_time.wait_s(
            request, list(scheduler.running), list(scheduler.waiting), arrivals
        )
        if scheduler.queue_capacity - num_arriving - len(arrivals) <= 0:
            reason = f"max_queue_size={config.max_queue_size} requests are waiting already"
            raise EngineFull(reason, wait_s)
        if 0 < config.max_queue_s < wait_s:
            reason = f"max_queue_s={config.max_queue_s:g}: a request would wait {wait_s:.1f} s"
            raise EngineFull(reason, wait_s)
        return wait_s

    def expect(self, request: Request, wait_s: float) -> None:
        """The request waits, for ``wait_s`` as estimated."""
        first_token_s = self._engine.queue_time.first_token_s(request, wait_s)
        self._expectations[request.id] = ExpectedWait(time.monotonic(), first_token_s)

    def note(self, output: RequestOutput) -> None:
        """Measures the wait of a request at its first output."""
        if not output.tokens and output.finish is None:
            return
        expectation = self._expectations.pop(output.request_id, None)
        if expectation is not None and output.tokens:
            seconds = time.monotonic() - expectation.submit_time
            self._engine.queue_time.record_wait(expectation.first_token_s, seconds)

    def refuse_late(self) -> list[RequestOutput]:
        """Ends the requests that have waited for a slot for much longer than ``max_queue_s``, and
        those that will have."""
        max_queue_s = self._engine.config.max_queue_s
        if not max_queue_s:
            return []
        now, reasons = time.monotonic(), {}
        for request in self._withdraw_late(now - LATE * max_queue_s):
            if (expectation := self._expectations.get(request.id)) is not None:
                seconds = now - expectation.submit_time
                self._engine.queue_time.record_late(expectation.first_token_s, seconds)
            reasons[request.id] = f"it has waited for {LATE * max_queue_s:g} s"
        if now >= self._next_estimate:
            self._next_estimate = now + ESTIMATE_S
            for request in self._withdraw_hopeless(now, HOPELESS * max_queue_s):
                reasons[request.id] = "by now it would wait for longer"
        return [
            RequestOutput(
                request_id=request_id,
                finish="error",
                error=f"max_queue_s={max_queue_s:g}: {reason}",
            )
            for request_id, reason in reasons.items()
        ]

    def _withdraw_late(self, last_arrival: float) -> list[Request]:
        """Those that came before, whatever their weights."""
        waiting = self._engine.scheduler.waiting
        return self._engine.withdraw([s for s in waiting if s.arrival_time < last_arrival])

    def _withdraw_hopeless(self, now: float, limit_s: float) -> list[Request]:
        """Those that will have waited for longer than ``limit_s``, as estimated now. Those that
        came last are looked at first, and none before one that will wait less."""
        engine = self._engine
        waiting, hopeless = sorted(engine.scheduler.waiting, key=lambda s: s.arrival), []
        while waiting:
            last = waiting.pop()
            wait_s = engine.queue_time.wait_s(last.request, engine.scheduler.running, waiting)
            if now - last.arrival_time + wait_s <= limit_s:
                break
            hopeless.append(last)
        return engine.withdraw(hopeless)
