"""Spares a flooded server the work for requests that the engines would refuse.

To parse, tokenize and submit a request costs the process that serves HTTP as much as 20 tokens of
an answer. At ten times the load that the engines can take, nearly all of that would be for requests
that are refused, while those that are admitted wait behind them.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from nanochat_ray.engine.request import EngineFull

REFUSAL_S = 0.1
"""For so long after a refusal no engine is asked again; longer where the event loop is slower. That
is short beside the time that requests may wait in a queue, so that no queue runs empty."""
MAX_REFUSAL_S = 1.0
MAX_STARTS = 8
"""Requests that begin in one iteration of the event loop; more if the last one took long. Between
two iterations the streams that run get their tokens, and refusals by the engines arrive …"""
STARTS_PER_S = 200
"""… so that requests that begin take about a quarter of a busy event loop's time: 1.3 ms each."""
MAX_WAIT_S = 0.5
"""A request that has not begun by then is refused: the wait in an engine's queue comes on top."""


class AdmissionGate:
    """What a request passes before its body is read.

    Refusals count for each client (API key) by itself: slots are shared fairly, so the queue of one
    client says nothing of another's. Not safe for threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._refusals: dict[str, tuple[float, EngineFull]] = {}
        """The latest of each client, and until when it counts; the one that ends first is first."""
        self._waiting: deque[tuple[str, float, asyncio.Future[None]]] = deque()
        """For an iteration in which they may begin: clients and times in the order of arrival."""
        self._num_starts, self._max_starts = 0, MAX_STARTS
        """In this iteration of the event loop."""
        self._iteration_start = self._iteration_s = 0.0

    def record(self, client: str, priority: int, refusal: EngineFull) -> None:
        """The engines have refused a request of the client. Only one of ``priority`` 0, the most
        urgent, shows that they would refuse any other."""
        if priority > 0:
            return
        self._refusals.pop(client, None)
        # Within two iterations the requests that have begun are not yet refused.
        seconds = min(MAX_REFUSAL_S, max(REFUSAL_S, 2 * self._iteration_s))
        self._refusals[client] = self._clock() + seconds, refusal
        for name, _, turn in self._waiting:
            if name == client and not turn.done():
                turn.set_result(None)

    def refuses(self, client: str) -> bool:
        """Whether the engines have just refused a request of the client."""
        now = self._clock()
        while self._refusals:
            oldest, (end, _) = next(iter(self._refusals.items()))
            if end > now:
                break
            del self._refusals[oldest]
        return client in self._refusals

    def check(self, client: str) -> None:
        """EngineFull if it ``refuses`` the client."""
        if self.refuses(client):
            _, refusal = self._refusals[client]
            raise EngineFull(str(refusal), refusal.retry_after_s)

    async def enter(self, client: str) -> None:
        """Waits until the request may begin. EngineFull as ``check``, at once, or after
        ``MAX_WAIT_S``."""
        self.check(client)
        if not self._waiting and self._num_starts < self._max_starts:
            self._start()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((client, self._clock(), turn))
        await turn
        self.check(client)

    def _start(self) -> None:
        if not self._num_starts:
            self._iteration_start = self._clock()
            asyncio.get_running_loop().call_soon(self._next_iteration)
        self._num_starts += 1

    def _next_iteration(self) -> None:
        now = self._clock()
        self._iteration_s = now - self._iteration_start
        self._num_starts = 0
        self._max_starts = max(MAX_STARTS, int(STARTS_PER_S * self._iteration_s))
        while self._waiting and self._num_starts < self._max_starts:
            _, arrival, turn = self._waiting.popleft()
            if turn.done():  # refused, or its client has left
                continue
            if now - arrival > MAX_WAIT_S:
                turn.set_exception(EngineFull("more requests came than the server can begin"))
            else:
                self._start()
                turn.set_result(None)
        if not self._num_starts:
            self._max_starts = MAX_STARTS
