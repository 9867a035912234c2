"""The engine replicas as an ingress sees them, and which of them may get a request. No Ray."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Any

from nanochat_ray.engine.request import WEIGHTS_REPLACED, EngineFull, Request, WeightsReplacedError
from nanochat_ray.on_ray.serve.connection import Connection
from nanochat_ray.on_ray.serve.routing import PrefixRouter
from nanochat_ray.serve.client import OutputStream, UnavailableError

QUEUES_FULL_RETRY_S = 0.2
NONE_USABLE_RETRY_S = 0.5
"""At most: a replica that becomes ready ends the wait at once."""


@dataclass
class InFlightRequest:
    """A request that is not complete."""

    request: Request
    stream: OutputStream
    tokens: list[int] = field(default_factory=list)
    """Generated so far, on any replica."""
    weight_version: str = ""
    """The weights that generated them: only a replica that has these may continue."""
    num_dispatches: int = 0
    replica: ReplicaHandle | None = None
    is_dispatching: bool = True
    is_closed: bool = False

    @property
    def wire_id(self) -> str:
        # A new id for each dispatch, so that late messages of an earlier one match no request.
        return f"{self.request.id}.{self.num_dispatches}"

    def detach(self) -> None:
        """From the replica that has it, if one does."""
        if self.replica is not None:
            self.replica.in_flight.pop(self.wire_id, None)
            self.replica = None


@dataclass(eq=False)
class ReplicaHandle:
    """An engine replica as this ingress sees it."""

    name: str
    connection: Connection | None = None
    in_flight: dict[str, InFlightRequest] = field(default_factory=dict)
    """By their ``wire_id``."""
    replies: dict[str, asyncio.Future[str]] = field(default_factory=dict)
    """Submitted requests that the replica has not replied to."""
    is_ready: bool = False
    is_listed: bool = True
    """Whether the controller lists it; one that shuts down gets no new requests."""
    is_draining: bool = False
    status: dict[str, Any] = field(default_factory=dict)
    """Its last heartbeat."""
    queue_wait_s: float = 1.0
    """How long a request would wait there, as of the last one that its queue refused."""
    num_other_requests: int = 0
    """Requests of other ingresses there, as of that heartbeat."""

    @property
    def load(self) -> int:
        return len(self.in_flight) + self.num_other_requests

    @property
    def is_usable(self) -> bool:
        return self.is_ready and self.is_listed and not self.is_draining

    @property
    def weight_version(self) -> str:
        return str(self.status.get("weight_version", ""))

    @property
    def is_swapping(self) -> bool:
        """Whether new requests wait there for new weights."""
        return bool(self.status.get("is_swapping"))


class ReplicaSet:
    """The replicas by name, and what each has in its prefix cache."""

    def __init__(self) -> None:
        self.by_name: dict[str, ReplicaHandle] = {}
        self.router = PrefixRouter()
        self.list_now = asyncio.Event()
        """Set when the list of replicas is likely out of date."""
        self._ready = asyncio.Condition()

    async def notify_ready(self) -> None:
        """A replica has become ready."""
        async with self._ready:
            self._ready.notify_all()

    def remove(self, replica: ReplicaHandle) -> None:
        self.by_name.pop(replica.name, None)
        self.router.forget(replica.name)

    def usable(self) -> list[ReplicaHandle]:
        return [replica for replica in self.by_name.values() if replica.is_usable]

    @property
    def weight_version(self) -> str:
        """Of the replica that a new request would likely get; "" if there is none."""
        best = min(self.usable(), key=lambda r: (r.is_swapping, r.load), default=None)
        return best.weight_version if best is not None else ""

    def may_leave(self, entry: InFlightRequest, replica: ReplicaHandle) -> bool:
        """Whether the request has not begun and another replica would not make it wait for new
        weights, as this one does."""
        return (
            replica.is_swapping
            and not entry.tokens
            and not entry.weight_version
            and any(not r.is_swapping for r in self.usable())
        )

    async def choose(
        self,
        entry: InFlightRequest,
        full: set[str],
        deadline: float,
        wait_for_capacity: bool,
    ) -> ReplicaHandle:
        """The replica for a request. ``full``: those whose queue has refused it.

        Without a usable replica it waits for one until ``deadline`` (``time.monotonic``), then
        raises UnavailableError. If all are full it raises EngineFull; with ``wait_for_capacity``
        only at the deadline, and until then it clears ``full`` to ask each again.
        WeightsReplacedError as ``_with_weights_of``.
        """
        while True:
            if candidates := self._with_weights_of(entry):
                available = [r for r in candidates if r.name not in full]
                if not entry.weight_version:
                    available = [r for r in available if not r.is_swapping] or available
                if loads := {r.name: r.load for r in available}:
                    prompt, scope = entry.request.prompt, entry.request.cache_scope
                    return self.by_name[self.router.choose(prompt, loads, scope)]
                if not wait_for_capacity or time.monotonic() > deadline:
                    wait_s = min(r.queue_wait_s for r in candidates)
                    raise EngineFull("every engine's queue is full", wait_s)
                full.clear()
                await asyncio.sleep(QUEUES_FULL_RETRY_S)
                continue
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise UnavailableError("no engine was found in time")
            self.list_now.set()
            async with self._ready:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(remaining, NONE_USABLE_RETRY_S)):
                        await self._ready.wait()

    def _with_weights_of(self, entry: InFlightRequest) -> list[ReplicaHandle]:
        """Raises WeightsReplacedError if all have other weights than the request has begun with."""
        replicas = self.usable()
        if not entry.weight_version or not replicas:
            return replicas
        same = [r for r in replicas if r.weight_version == entry.weight_version]
        if not same:
            versions = ", ".join(sorted({r.weight_version for r in replicas}))
            raise WeightsReplacedError(
                f"{WEIGHTS_REPLACED} the answer began with {entry.weight_version}, which no engine "
                f"serves any more, but {versions}: send the request again"
            )
        return same
