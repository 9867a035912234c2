"""Spares a flooded server the work for requests that the engines would refuse.

To parse, tokenize and submit a request costs the process that serves HTTP as much as 20 tokens of
an answer. At ten times the load that the engines can take, nearly all of that would be for requests
that are refused, while those that are admitted wait behind them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nanochat_ray.engine.request import EngineFull

REFUSAL_S = 0.1
"""For so long after a refusal no engine is asked again; longer where the event loop is slower. That
is short beside the time that requests may wait in a queue, so that no queue runs empty."""
MAX_REFUSAL_S = 1.0
FLOOD_S = 2.0
"""For so long after a refusal, by the engines or here, a request of the client that may not begin
at once gets the refusal, too: it would wait for its turn in vain. Longer than a busy engine needs
to reply."""
MAX_STARTS = 8
"""Requests that begin in one iteration of the event loop; more if the last one took long. Between
two iterations the streams that run get their tokens, and refusals by the engines arrive …"""
STARTS_PER_S = 200
"""… so that requests that begin take about a quarter of a busy event loop's time: 1.3 ms each."""
MAX_UNDECIDED = 64
"""Requests that no engine has taken or refused yet, in a flood: a busy engine may take a second to
reply, in which short iterations would begin thousands."""
MAX_WAIT_S = 0.5
"""A request that has not begun by then is refused: the wait in an engine's queue comes on top. So
is one that would not at the pace of the last iteration."""
TOO_MANY = EngineFull("more requests came than the server can begin")


@dataclass
class _Flood:
    """More requests of a client than the engines take."""

    refusal: EngineFull
    all_until: float
    """Each request is refused by then."""
    end: float
    """By then requests do not wait."""


class AdmissionGate:
    """What a request passes before its body is read.

    Refusals count for each client (API key) by itself: slots are shared fairly, so the queue of one
    client says nothing of another's. Not safe for threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._floods: OrderedDict[str, _Flood] = OrderedDict()
        """By client; the one of the oldest refusal is first."""
        self._waiting: deque[tuple[str, float, asyncio.Future[None]]] = deque()
        """For an iteration in which they may begin: clients and times in the order of arrival."""
        self._num_starts, self._max_starts = 0, MAX_STARTS
        """In this iteration of the event loop."""
        self._num_undecided = 0
        self._iteration_start = self._iteration_s = 0.0
        self._sees_iterations = False
        """From the first request that begins until an iteration in which none does."""

    def record(self, client: str, priority: int, refusal: EngineFull) -> None:
        """The engines have refused a request of the client. Only one of ``priority`` 0, the most
        urgent, shows that they would refuse any other."""
        if priority > 0:
            return
        # Within two iterations the requests that have begun are not yet refused.
        seconds = min(MAX_REFUSAL_S, max(REFUSAL_S, 2 * self._iteration_s))
        now = self._clock()
        self._floods[client] = _Flood(refusal, now + seconds, now + seconds + FLOOD_S)
        self._floods.move_to_end(client)
        for name, _, turn in self._waiting:
            if name == client and not turn.done():
                turn.set_exception(_copy(refusal))

    def refusal(self, client: str) -> EngineFull | None:
        """What a request of the client gets now: the engines have just refused another one, or did
        in this flood and it is not its turn, or too many wait for theirs."""
        flood, now = self._flood(client), self._clock()
        if flood is not None and (
            now < flood.all_until or self._is_full() or self._num_undecided >= MAX_UNDECIDED
        ):
            flood.end = max(flood.end, now + FLOOD_S)
            self._floods.move_to_end(client)
            return flood.refusal
        wait_s = len(self._waiting) * self._iteration_s / self._max_starts
        return TOO_MANY if wait_s > MAX_WAIT_S else None

    @contextlib.contextmanager
    def submission(self) -> Iterator[None]:
        """While the engines decide on a request."""
        self._num_undecided += 1
        try:
            yield
        finally:
            self._num_undecided -= 1

    def is_flooded(self, client: str) -> bool:
        """Whether its requests do not wait."""
        return self._flood(client) is not None

    def _flood(self, client: str) -> _Flood | None:
        now = self._clock()
        while self._floods and next(iter(self._floods.values())).end <= now:
            self._floods.popitem(last=False)
        flood = self._floods.get(client)
        return flood if flood is not None and now < flood.end else None

    async def enter(self, client: str) -> None:
        """Waits until the request may begin. EngineFull for a ``refusal``, or after
        ``MAX_WAIT_S``."""
        if (refusal := self.refusal(client)) is not None:
            raise _copy(refusal)
        if not self._is_full():
            self.start()
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((client, self._clock(), turn))
        await turn

    def _is_full(self) -> bool:
        return bool(self._waiting) or self._num_starts >= self._max_starts

    def start(self) -> None:
        """Counts a request that begins in this iteration of the event loop."""
        self._num_starts += 1
        if not self._sees_iterations:
            self._sees_iterations = True
            self._iteration_start = self._clock()
            asyncio.get_running_loop().call_soon(self._next_iteration)

    def _next_iteration(self) -> None:
        """Lets the oldest begin that wait."""
        now = self._clock()
        self._iteration_s, self._iteration_start = now - self._iteration_start, now
        had_starts, self._num_starts = self._num_starts > 0, 0
        self._max_starts = max(MAX_STARTS, int(STARTS_PER_S * self._iteration_s))
        while self._waiting and self._num_starts < self._max_starts:
            _, arrival, turn = self._waiting.popleft()
            if turn.done():  # refused, or its client has left
                continue
            if now - arrival > MAX_WAIT_S:
                turn.set_exception(_copy(TOO_MANY))
            else:
                self.start()
                turn.set_result(None)
        self._sees_iterations = had_starts or self._num_starts > 0
        if self._sees_iterations:
            asyncio.get_running_loop().call_soon(self._next_iteration)
        else:
            self._max_starts, self._iteration_s = MAX_STARTS, 0.0


def _copy(refusal: EngineFull) -> EngineFull:
    """To raise, which adds a traceback to an exception."""
    return EngineFull(str(refusal), refusal.retry_after_s)
