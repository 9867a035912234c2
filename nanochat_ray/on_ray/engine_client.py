"""The ingress side of Serve: an ``EngineClient`` over links to all engine replicas.

One task asks Ray every few seconds which replicas there are and where; each has one link. When a
link breaks, the requests on it are given to another replica together with the tokens that have
come: sampling is a pure function of weights, seed and position, so the text goes on as if nothing
had happened.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from nanochat_ray.engine.request import EngineFull, Output, Request
from nanochat_ray.on_ray.link import ACCEPTED, NOT_HERE, QUEUE_FULL, Link
from nanochat_ray.on_ray.routing import PrefixRouter
from nanochat_ray.serve.client import OutputStream, UnavailableError

logger = logging.getLogger(__name__)

POLL_S = 5.0
"""How soon a new engine is found; one that is lost or leaves says so itself."""
POLL_UNREADY_S = 0.2
CALL_TIMEOUT_S = 10.0
LOST = (RayError, RayServeException, TimeoutError)


@dataclass
class Live:
    """A request that somebody waits for."""

    request: Request
    stream: OutputStream
    tokens: list[int] = field(default_factory=list)
    """What has come since the request began, on whatever replica."""
    moves: int = 0
    engine: Remote | None = None
    placing: bool = True
    closed: bool = False

    @property
    def wire_id(self) -> str:
        # A new name for each replica tried: late news of an old one must not be mistaken.
        return f"{self.request.id}.{self.moves}"


@dataclass(eq=False)
class Remote:
    """An engine replica as this ingress sees it."""

    replica: str
    link: Link | None = None
    live: dict[str, Live] = field(default_factory=dict)
    answers: dict[str, asyncio.Future[str]] = field(default_factory=dict)
    """Who waits for a request to be accepted."""
    open: bool = False
    listed: bool = True
    """The controller still counts it; one that shuts down gets nothing new."""
    leaving: bool = False
    figures: dict[str, Any] = field(default_factory=dict)
    """What it last said of itself."""
    others: int = 0
    """Requests of other ingresses there, as of then."""

    @property
    def load(self) -> int:
        return len(self.live) + self.others


class RayEngineClient:
    """``deadline_s``: how long a request may be without an engine before it fails."""

    def __init__(self, handle: DeploymentHandle, *, deadline_s: float = 60.0):
        self.handle = handle
        self.deadline_s = deadline_s
        self.name = secrets.token_hex(6)
        self.engines: dict[str, Remote] = {}
        self.router = PrefixRouter()
        self._changed = asyncio.Condition()
        self._poll_now = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._spawn(self._poll())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for engine in self.engines.values():
            if engine.link is not None:
                engine.link.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- the EngineClient

    async def submit(self, request: Request, stream: OutputStream) -> None:
        live = Live(request, stream, tokens=list(request.generated))
        stream.take(request.id, lambda: self._abort(live))
        try:
            await self._place(live)
        except BaseException:
            stream.drop(request.id)
            self._abort(live)
            raise

    async def health(self) -> dict[str, Any]:
        found = [engine.figures for engine in self.engines.values() if engine.open]
        if not found:
            raise UnavailableError("no engine is running")
        return {"engines": found}

    # ---- finding the engines

    async def _poll(self) -> None:
        warned = False
        while True:
            try:
                answers = await self.handle.broadcast("place").results_async(
                    timeout_s=CALL_TIMEOUT_S, return_exceptions=True
                )
                await self._found([a for a in answers if isinstance(a, dict) and a["address"]])
                warned = False
            except LOST as error:
                # At the start that is how it is: the engines load their model.
                if not warned:
                    logger.info("the engines cannot be asked: %s", error)
                warned = True
            ready = any(engine.open for engine in self.engines.values())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poll_now.wait(), POLL_S if ready else POLL_UNREADY_S)
            self._poll_now.clear()

    async def _found(self, answers: list[dict[str, Any]]) -> None:
        places = {a["replica"]: (a["address"], a["secret"]) for a in answers}
        for engine in self.engines.values():
            engine.listed = engine.replica in places
            if not engine.listed and not engine.live and engine.link is not None:
                engine.link.close()
        for name, place in places.items():
            engine = self.engines.setdefault(name, Remote(name))
            if engine.link is None:
                await self._connect(engine, *place)

    async def _connect(self, engine: Remote, address: list[Any], secret: str) -> None:
        try:
            _, link = await asyncio.wait_for(
                asyncio.get_running_loop().create_connection(
                    lambda: Link(
                        lambda _, message: self._received(engine, message),
                        lambda _: self._lost(engine),
                    ),
                    *address,
                ),
                CALL_TIMEOUT_S,
            )
        except (OSError, TimeoutError) as error:
            logger.warning("engine %s cannot be reached: %s", engine.replica, error)
            self.engines.pop(engine.replica, None)
            return
        engine.link = link
        link.send("hello", secret, self.name)

    def _received(self, engine: Remote, message: list[Any]) -> None:
        if message[0] == "outputs":
            for wire in message[1]:
                self._output(engine, wire)
        elif message[0] == "answer":
            waiting = engine.answers.pop(message[1], None)
            if waiting is not None and not waiting.done():
                waiting.set_result(message[2])
        elif message[0] == "leaving":
            engine.leaving = True
            self._poll_now.set()
        elif message[0] in ("hello", "status"):
            engine.figures = message[1]
            engine.others = max(0, message[1]["requests"] - len(engine.live))
            if not engine.open:
                engine.open = True
                self._spawn(self._notify())

    def _lost(self, engine: Remote) -> None:
        """Moves what was there to other engines."""
        if engine.listed and not engine.leaving:
            logger.warning("engine %s is lost", engine.replica)
        engine.open = False
        self.engines.pop(engine.replica, None)
        self.router.forget(engine.replica)
        self._poll_now.set()
        for waiting in engine.answers.values():
            if not waiting.done():
                waiting.set_result(NOT_HERE)
        stranded, engine.live = list(engine.live.values()), {}
        for live in stranded:
            live.engine = None
            if not live.placing:  # else the task that places it looks again by itself
                self._spawn(self._move(live))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _output(self, engine: Remote, wire: dict[str, Any]) -> None:
        name = wire["id"]
        live = engine.live.get(name)
        if live is None:
            return  # aborted, or moved elsewhere
        # Its reader knows the request by the name that it has given it.
        output = Output.from_wire({**wire, "id": live.request.id})
        live.tokens += output.tokens
        if output.finish is not None:
            del engine.live[name]
            live.engine = None
            live.closed = True
        live.stream.push(output)

    # ---- giving requests to engines

    async def _move(self, live: Live) -> None:
        live.moves += 1
        live.placing = True
        try:
            await self._place(live, patient=True)
        except (UnavailableError, EngineFull) as error:
            reason = f"the engine was lost and no other took over: {error}"
            live.stream.fail(live.request.id, UnavailableError(reason))
        except Exception as error:
            logger.exception("request %s could not be moved", live.request.id)
            live.stream.fail(live.request.id, UnavailableError(f"the engine was lost: {error}"))

    async def _place(self, live: Live, patient: bool = False) -> None:
        """Hands a request to an engine, another if that one fails, until the deadline.

        Raises UnavailableError, ValueError, or EngineFull when every engine is full; ``patient``
        waits for room instead, since somebody has read the beginning of that answer.
        """
        patience = self.deadline_s
        if live.request.deadline is not None:
            patience = min(patience, live.request.deadline - time.time())
        until = time.monotonic() + patience
        full: set[str] = set()
        while not live.closed:
            engine = await self._choose(live, full, until, patient)
            answer = await self._offer(live, engine)
            if answer == ACCEPTED and (live.engine is engine or live.closed):
                live.placing = False
                return
            self._unlink(live)
            live.moves += 1
            if answer == QUEUE_FULL:
                full.add(engine.replica)
            elif answer not in (ACCEPTED, NOT_HERE):
                raise ValueError(answer)
            elif not live.closed:
                # It dies, or is busy dying: its link's end will tell. Look around meanwhile.
                engine.listed = False
                await asyncio.sleep(0.05)

    async def _offer(self, live: Live, engine: Remote) -> str:
        """What the engine answers to the request."""
        assert engine.link is not None
        live.engine, live.placing = engine, True
        name = live.wire_id
        engine.live[name] = live
        request = dataclasses.replace(live.request, id=name, generated=tuple(live.tokens))
        answered = engine.answers[name] = asyncio.get_running_loop().create_future()
        try:
            engine.link.send("submit", request.to_wire())
            answer = await asyncio.wait_for(answered, CALL_TIMEOUT_S)
        except TimeoutError:
            engine.link.send("abort", [name])
            answer = NOT_HERE
        finally:
            engine.answers.pop(name, None)
        if answer == ACCEPTED:
            request = live.request
            self.router.sent(engine.replica, request.prompt, request.cache_scope)
        return answer

    async def _choose(self, live: Live, full: set[str], until: float, patient: bool) -> Remote:
        while True:
            usable = [e for e in self.engines.values() if e.open and e.listed and not e.leaving]
            if usable:
                loads = {e.replica: e.load for e in usable if e.replica not in full}
                if loads:
                    prompt, scope = live.request.prompt, live.request.cache_scope
                    return self.engines[self.router.choose(prompt, loads, scope)]
                if not patient or time.monotonic() > until:
                    raise EngineFull("every engine's queue is full")
                full.clear()
                await asyncio.sleep(0.2)
                continue
            left = until - time.monotonic()
            if left <= 0:
                raise UnavailableError("no engine was found in time")
            self._poll_now.set()
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), min(left, 0.5))

    def _unlink(self, live: Live) -> None:
        if live.engine is not None:
            live.engine.live.pop(live.wire_id, None)
            live.engine = None

    def _abort(self, live: Live) -> None:
        live.closed = True
        engine = live.engine
        if engine is None:
            return
        self._unlink(live)
        if engine.link is not None:
            engine.link.send("abort", [live.wire_id])
