"""The ingress side of Serve: an ``EngineClient`` over the streams of all engine replicas.

One task asks every second which replicas there are; one task for each of them reads its stream.
When a stream breaks, the requests on it are given to another replica together with the tokens that
have come: sampling is a pure function of weights, seed and position, so the text goes on as if
nothing had happened.
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

import msgpack
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from nanochat_ray.engine.request import EngineFull, Output, Request
from nanochat_ray.on_ray.routing import ACCEPTED, QUEUE_FULL
from nanochat_ray.serve.client import OutputStream, UnavailableError

logger = logging.getLogger(__name__)

POLL_S = 1.0
CALL_TIMEOUT_S = 10.0
LOST = (RayError, RayServeException, TimeoutError, asyncio.CancelledError)


@dataclass
class Live:
    """A request that somebody waits for."""

    request: Request
    stream: OutputStream | None = None
    tokens: list[int] = field(default_factory=list)
    """What has come since the request began, on whatever replica."""
    moves: int = 0
    link: Link | None = None
    placing: bool = True
    closed: bool = False

    @property
    def wire_id(self) -> str:
        # A new name for each replica tried: late news of an old one must not be mistaken.
        return f"{self.request.id}.{self.moves}"


@dataclass(eq=False)
class Link:
    """The stream from one engine replica."""

    replica: str
    live: dict[str, Live] = field(default_factory=dict)
    open: bool = False
    listed: bool = True
    """The controller still counts it; one that shuts down gets nothing new."""
    others: int = 0
    """Requests of other ingresses there, when it was last asked."""
    task: asyncio.Task[None] | None = None

    @property
    def load(self) -> int:
        return len(self.live) + self.others


class RayEngineClient:
    """``deadline_s``: how long a request may be without an engine before it fails."""

    def __init__(self, handle: DeploymentHandle, *, deadline_s: float = 60.0):
        self.handle = handle
        self.deadline_s = deadline_s
        self.name = secrets.token_hex(6)
        self.links: dict[str, Link] = {}
        self._figures: dict[str, dict[str, Any]] = {}
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
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- the EngineClient

    async def submit(self, request: Request) -> OutputStream:
        live = Live(request, tokens=list(request.generated))
        live.stream = OutputStream(lambda: self._abort(live))
        try:
            await self._place(live)
        except BaseException:
            self._abort(live)
            raise
        return live.stream

    async def health(self) -> dict[str, Any]:
        engines = [self._figures[link.replica] for link in self.links.values() if link.open]
        if not engines:
            raise UnavailableError("no engine is running")
        return {"engines": engines}

    # ---- finding the engines

    async def _poll(self) -> None:
        warned = False
        while True:
            try:
                answers = await self.handle.broadcast("status", ingress=self.name).results_async(
                    timeout_s=CALL_TIMEOUT_S, return_exceptions=True
                )
                self._found([a for a in answers if isinstance(a, dict)])
                warned = False
            except LOST[:3] as error:
                # At the start that is how it is: the engines load their model.
                if not warned:
                    logger.info("the engines cannot be asked: %s", error)
                warned = True
            ready = any(link.open for link in self.links.values())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poll_now.wait(), POLL_S if ready else POLL_S / 5)
            self._poll_now.clear()

    def _found(self, answers: list[dict[str, Any]]) -> None:
        self._figures = {answer["replica"]: answer for answer in answers}
        for link in self.links.values():
            link.listed = link.replica in self._figures
            if not link.listed and not link.live and link.task is not None:
                link.task.cancel()
        for name, figures in self._figures.items():
            link = self.links.setdefault(name, Link(name))
            link.others = max(0, figures["requests"] - len(link.live))
            if link.task is None:
                link.task = self._spawn(self._listen(link))

    async def _listen(self, link: Link) -> None:
        """Reads one replica's stream to its end, then moves what was on it."""
        stream: Any = self.handle.options(method_name="connect", stream=True).remote(
            ingress=self.name, replica=link.replica
        )
        try:
            async for message in stream:
                if not link.open:
                    link.open = True
                    await self._notify()
                for wire in msgpack.unpackb(message):
                    self._receive(link, Output.from_wire(wire))
        except (RayError, RayServeException) as error:
            logger.warning("engine %s is lost: %s", link.replica, type(error).__name__)
        finally:
            stream.cancel()
            link.open = False
            self.links.pop(link.replica, None)
            self._poll_now.set()
            stranded, link.live = list(link.live.values()), {}
            for live in stranded:
                live.link = None
                if not live.placing:  # else the task that places it looks again by itself
                    self._spawn(self._move(live))

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _receive(self, link: Link, output: Output) -> None:
        live = link.live.get(output.request_id)
        if live is None:
            return  # aborted, or moved elsewhere
        live.tokens += output.tokens
        if output.finish is not None:
            del link.live[output.request_id]
            live.link = None
            live.closed = True
        assert live.stream is not None
        live.stream.push(output)

    # ---- giving requests to engines

    async def _move(self, live: Live) -> None:
        live.moves += 1
        live.placing = True
        assert live.stream is not None
        try:
            await self._place(live, patient=True)
        except (UnavailableError, EngineFull) as error:
            live.stream.fail(
                UnavailableError(f"the engine was lost and no other took over: {error}")
            )
        except Exception as error:
            logger.exception("request %s could not be moved", live.request.id)
            live.stream.fail(UnavailableError(f"the engine was lost: {error}"))

    async def _place(self, live: Live, patient: bool = False) -> None:
        """Hands a request to the least busy engine, another if that one fails, until the deadline.

        Raises UnavailableError, ValueError, or EngineFull when every engine is full; ``patient``
        waits for room instead, since somebody has read the beginning of that answer.
        """
        until = time.monotonic() + self.deadline_s
        full: set[str] = set()
        while not live.closed:
            link = await self._choose(full, until, patient)
            live.link, live.placing = link, True
            link.live[live.wire_id] = live
            request = dataclasses.replace(
                live.request, id=live.wire_id, generated=tuple(live.tokens)
            )
            try:
                answer = await asyncio.wait_for(
                    self._call("submit", link, request=msgpack.packb(request.to_wire())),
                    CALL_TIMEOUT_S,
                )
            except RayTaskError as error:
                self._unlink(live)
                if isinstance(error.cause, ValueError):
                    raise ValueError(str(error.cause)) from None
                answer = ""
            except (RayError, RayServeException, TimeoutError):
                answer = ""
            if answer == ACCEPTED and (live.link is link or live.closed):
                live.placing = False
                return
            self._unlink(live)
            live.moves += 1
            if answer == QUEUE_FULL:
                full.add(link.replica)
            elif not live.closed:
                # It dies, or is busy dying: its stream's end will tell. Look around meanwhile.
                link.listed = False
                await asyncio.sleep(0.05)

    async def _choose(self, full: set[str], until: float, patient: bool) -> Link:
        while True:
            usable = [link for link in self.links.values() if link.open and link.listed]
            if usable:
                free = [link for link in usable if link.replica not in full]
                if free:
                    return min(free, key=lambda link: link.load)
                if not patient or time.monotonic() > until:
                    raise EngineFull("every engine's queue is full")
                full.clear()
                await asyncio.sleep(0.2)
                continue
            left = until - time.monotonic()
            if left <= 0:
                raise UnavailableError(f"no engine was found within {self.deadline_s:.0f} s")
            self._poll_now.set()
            async with self._changed:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), min(left, 0.5))

    async def _call(self, method: str, link: Link, **fields: Any) -> Any:
        call = getattr(self.handle, method)
        if method == "submit":
            fields["ingress"] = self.name
        return await call.remote(replica=link.replica, **fields)

    def _unlink(self, live: Live) -> None:
        if live.link is not None:
            live.link.live.pop(live.wire_id, None)
            live.link = None

    def _abort(self, live: Live) -> None:
        live.closed = True
        link = live.link
        if link is None:
            return
        self._unlink(live)

        async def tell() -> None:
            with contextlib.suppress(RayError, RayServeException, TimeoutError):
                await asyncio.wait_for(
                    self._call("abort", link, requests=[live.wire_id]), CALL_TIMEOUT_S
                )

        self._spawn(tell())
