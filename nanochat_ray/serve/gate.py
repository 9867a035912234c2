"""Spares a flooded server the work for requests that the engines would refuse.

To parse, tokenize and submit a request costs the process that serves HTTP as much as 20 tokens of
an answer. At ten times the load that the engines can take, nearly all of that would be for requests
that are refused, while those that are admitted wait behind them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from nanochat_ray.engine.request import EngineFull

REFUSAL_S = 0.1
"""For so long after a refusal no engine is asked again; longer where the event loop is slower. That
is short beside the time that requests may wait in a queue, so that no queue runs empty."""
MAX_REFUSAL_S = 1.0
FLOOD_S = 2.0
"""A flood ends so long after that, or after the last refusal here while a reply by an engine was
due. In it a request that may not begin at once is refused, too, and does not wait to be."""
MAX_STARTS = 8
"""Requests that begin in one iteration of the event loop; more if the last one took long. Between
two iterations the streams that run get their tokens, and refusals by the engines arrive …"""
STARTS_PER_S = 200
"""… so that requests that begin take about a quarter of a busy event loop's time: 1.3 ms each."""
MAX_UNDECIDED = 64
"""Of a client in a flood: submitted requests that no engine has taken or refused yet. A busy engine
may take a second to reply, in which short iterations would begin thousands."""
MAX_WAIT_S = 0.5
"""A request that has not begun by then is refused: the wait in an engine's queue comes on top. So
is one that would not at the pace of the last iteration."""
TOO_MANY = EngineFull("more requests came than the server can begin")


@dataclass(eq=False)
class _Client:
    """An API key: there are as many as the server has keys."""

    turns: dict[asyncio.Future[None], float] = field(default_factory=dict)
    """Of requests that wait for one, with the times of their arrival; the oldest first."""
    num_starts: int = 0
    """In this iteration of the event loop."""
    num_undecided: int = 0
    refusal: EngineFull | None = None
    """The latest by an engine."""
    refused_until: float = 0.0
    """Each request is, by then."""
    flood_end: float = 0.0


class AdmissionGate:
    """What a request passes before its body is read.

    Clients (API keys) share it evenly, and refusals count for each by itself: slots are shared
    fairly, so the queue of one client says nothing of another's. Not safe for threads.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._clients: defaultdict[str, _Client] = defaultdict(_Client)
        self._active: dict[_Client, None] = {}
        """Requests of these begin in this iteration of the event loop, or wait."""
        self._num_starts, self._max_starts = 0, MAX_STARTS
        """In this iteration. As many again may begin of clients that do not wait."""
        self._share = MAX_STARTS
        """Most of one client."""
        self._iteration_start = self._iteration_s = 0.0
        self._sees_iterations = False
        """From the first request that begins until an iteration in which none does."""

    def record(self, client: str, priority: int, refusal: EngineFull) -> None:
        """The engines have refused a request of the client. Only one of ``priority`` 0, the most
        urgent, shows that they would refuse any other."""
        if priority > 0:
            return
        state = self._clients[client]
        state.refusal = _copy(refusal)
        # Within two iterations the requests that have begun are not yet refused.
        seconds = min(MAX_REFUSAL_S, max(REFUSAL_S, 2 * self._iteration_s))
        state.refused_until = self._clock() + seconds
        state.flood_end = state.refused_until + FLOOD_S
        for turn in state.turns:
            if not turn.done():
                turn.set_exception(_copy(refusal))
        state.turns.clear()

    def refusal(self, client: str) -> EngineFull | None:
        """What a request of the client gets now: the engines have just refused another one, or did
        in this flood and it is not its turn, or too many wait for theirs."""
        state, now = self._clients[client], self._clock()
        if now >= state.flood_end:
            wait_s = len(state.turns) * self._iteration_s / self._share
            return TOO_MANY if wait_s > MAX_WAIT_S else None
        may_begin = self._may_begin(state) and state.num_undecided < MAX_UNDECIDED
        if now >= state.refused_until and may_begin:
            return None
        if state.num_undecided:  # but not for ever: the engines may take them all
            end = min(now, state.refused_until + FLOOD_S) + FLOOD_S
            state.flood_end = max(state.flood_end, end)
        return state.refusal

    def begin_in_flood(self, client: str) -> bool:
        """Lets a request begin that got no ``refusal``, if those of its client do not wait."""
        state = self._clients[client]
        if self._clock() >= state.flood_end:
            return False
        self._begin(state)
        return True

    async def enter(self, client: str) -> None:
        """Waits until the request may begin. EngineFull for a ``refusal``, or after
        ``MAX_WAIT_S``."""
        if (refusal := self.refusal(client)) is not None:
            raise _copy(refusal)
        state = self._clients[client]
        if self._may_begin(state):
            self._begin(state)
            return
        turn = asyncio.get_running_loop().create_future()
        state.turns[turn] = self._clock()
        self._active[state] = None
        try:
            await turn
        finally:
            state.turns.pop(turn, None)

    @contextlib.contextmanager
    def submission(self, client: str) -> Iterator[None]:
        """While the engines decide on a request of the client."""
        state = self._clients[client]
        state.num_undecided += 1
        try:
            yield
        finally:
            state.num_undecided -= 1

    def _may_begin(self, state: _Client) -> bool:
        is_full = self._num_starts >= 2 * self._max_starts
        return not is_full and not state.turns and state.num_starts < self._share

    def _begin(self, state: _Client) -> None:
        state.num_starts += 1
        self._num_starts += 1
        self._active[state] = None
        if not self._sees_iterations:
            self._sees_iterations = True
            self._iteration_start = self._clock()
            asyncio.get_running_loop().call_soon(self._next_iteration)

    def _next_iteration(self) -> None:
        """Lets the oldest of each client begin."""
        now = self._clock()
        self._iteration_s, self._iteration_start = now - self._iteration_start, now
        # Last those that have had a turn.
        active = sorted(self._active, key=lambda state: state.num_starts > 0)
        self._active, self._num_starts = {}, 0
        if not active:
            self._sees_iterations = False
            self._max_starts = self._share = MAX_STARTS
            self._iteration_s = 0.0
            return
        self._max_starts = max(MAX_STARTS, int(STARTS_PER_S * self._iteration_s))
        self._share = max(1, self._max_starts // len(active))
        for state in active:
            state.num_starts = 0
            while (
                state.turns
                and state.num_starts < self._share
                and self._num_starts < self._max_starts
            ):
                self._give_turn(state, now)
        self._active = dict.fromkeys(s for s in active if s.turns or s.num_starts)
        asyncio.get_running_loop().call_soon(self._next_iteration)

    def _give_turn(self, state: _Client, now: float) -> None:
        turn = next(iter(state.turns))
        arrival = state.turns.pop(turn)
        if turn.done():  # its client has left
            return
        if now - arrival > MAX_WAIT_S:
            turn.set_exception(_copy(TOO_MANY))
        else:
            self._begin(state)
            turn.set_result(None)


def _copy(refusal: EngineFull) -> EngineFull:
    """Without the traceback of the one, and to be raised, which adds another."""
    return EngineFull(str(refusal), refusal.retry_after_s)
