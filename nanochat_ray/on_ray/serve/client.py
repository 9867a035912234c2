"""The ingress side of Serve: an ``EngineClient`` over connections to all engine replicas.

One task asks Ray every few seconds for the replicas and their addresses; each gets one connection.
When a connection breaks, its requests are migrated to another replica together with the tokens that
have arrived: sampling is a pure function of weights, seed and position, so the text is the same as
without the migration.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import Coroutine
from typing import Any

from ray.serve.handle import DeploymentHandle

from nanochat_ray.engine.request import (
    WEIGHTS_REPLACED,
    EngineFull,
    Request,
    RequestOutput,
    WeightsReplacedError,
)
from nanochat_ray.on_ray.serve.connection import (
    ACCEPTED,
    HEARTBEAT_S,
    LIVENESS_TIMEOUT_S,
    NOT_HERE,
    OTHER_WEIGHTS,
    QUEUE_FULL,
    Connection,
    SilenceLimit,
)
from nanochat_ray.on_ray.serve.endpoints import CALL_ERRORS, list_endpoints
from nanochat_ray.on_ray.serve.replica_set import InFlightRequest, ReplicaHandle, ReplicaSet
from nanochat_ray.serve.client import OutputStream, UnavailableError

logger = logging.getLogger(__name__)

POLL_S = 5.0
"""How often replicas are listed, and the follower is asked. A replica that disconnects or drains is
noticed at once."""
POLL_UNREADY_S = 0.2
CALL_TIMEOUT_S = 10.0
"""By ``asyncio.timeout``: ``wait_for`` of Python 3.11 may lose a cancellation."""


class RayEngineClient:
    """``deadline_s``: how long a request may be without a replica before it fails.
    ``liveness_timeout_s``: how long a replica may be silent. ``follower``: the deployment that
    swaps the weights of the replicas, if there is one."""

    def __init__(
        self,
        handle: DeploymentHandle,
        *,
        deadline_s: float = 60.0,
        liveness_timeout_s: float = LIVENESS_TIMEOUT_S,
        follower: DeploymentHandle | None = None,
    ):
        self.handle, self.follower = handle, follower
        self.deadline_s, self.liveness_timeout_s = deadline_s, liveness_timeout_s
        self.silence = SilenceLimit(liveness_timeout_s)
        self.follow_status: dict[str, Any] = {}
        self.name = secrets.token_hex(6)
        self.replicas = ReplicaSet()
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._spawn(self._poll())
        self._spawn(self._watch_connections())
        if self.follower is not None:
            self._spawn(self._poll_follower(self.follower))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        for replica in self.replicas.by_name.values():
            if replica.connection is not None:
                replica.connection.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # ---- the EngineClient

    async def submit(self, request: Request, stream: OutputStream) -> None:
        entry = InFlightRequest(
            request,
            stream,
            tokens=list(request.output_token_ids),
            weight_version=request.weight_version,
        )
        stream.take(request.id, lambda: self._abort(entry))
        try:
            await self._dispatch(entry)
        except BaseException:
            stream.drop(request.id)
            self._abort(entry)
            raise

    @property
    def weight_version(self) -> str:
        return self.replicas.weight_version

    async def health(self) -> dict[str, Any]:
        statuses = [r.status for r in self.replicas.by_name.values() if r.is_ready]
        if not statuses:
            raise UnavailableError("no engine is running")
        health: dict[str, Any] = {"engines": statuses}
        return health if self.follower is None else {**health, "follow": self.follow_status}

    # ---- discovery of replicas

    async def _poll(self) -> None:
        has_warned = False
        while True:
            try:
                endpoints = await list_endpoints(self.handle)
                await self._update_replicas([e for e in endpoints if e["address"]])
                has_warned = False
            except CALL_ERRORS as error:
                # Normal at the start, while the replicas load their model.
                if not has_warned:
                    logger.info("the engine replicas cannot be listed: %s", error)
                has_warned = True
            except Exception:  # else this ingress would never see another replica
                logger.exception("the engine replicas cannot be listed")
            any_ready = any(r.is_ready for r in self.replicas.by_name.values())
            period = POLL_S if any_ready else POLL_UNREADY_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(period):
                    await self.replicas.list_now.wait()
            self.replicas.list_now.clear()

    async def _poll_follower(self, follower: DeploymentHandle) -> None:
        """Apart from ``_poll``: while the follower restarts its calls wait, and replicas must be
        listed."""
        while True:
            with contextlib.suppress(*CALL_ERRORS):
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    self.follow_status = await follower.status.remote()
            await asyncio.sleep(POLL_S)

    async def _update_replicas(self, endpoints: list[dict[str, Any]]) -> None:
        addresses = {e["replica"]: (e["address"], e["secret"]) for e in endpoints}
        for replica in self.replicas.by_name.values():
            replica.is_listed = replica.name in addresses
            if not replica.is_listed and not replica.in_flight and replica.connection is not None:
                replica.connection.close()
        replicas = [self.replicas.by_name.setdefault(n, ReplicaHandle(n)) for n in addresses]
        # All at once: a host that is gone may not answer at all.
        await asyncio.gather(
            *(self._connect(r, *addresses[r.name]) for r in replicas if r.connection is None)
        )

    async def _connect(self, replica: ReplicaHandle, address: list[Any], secret: str) -> None:
        def make_connection() -> Connection:
            return Connection(
                lambda _, message: self._on_message(replica, message),
                lambda _: self._on_disconnected(replica),
            )

        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(make_connection, *address)
        except (OSError, TimeoutError) as error:
            logger.warning("engine replica %s cannot be reached: %s", replica.name, error)
            self.replicas.remove(replica)
            return
        replica.connection = connection
        connection.send("handshake", secret, self.name)

    async def _watch_connections(self) -> None:
        """Sends heartbeats. Migrates the requests of a replica that is silent, since it hangs or
        its host has vanished, which closes no connection."""
        while True:
            await asyncio.sleep(min(HEARTBEAT_S, self.liveness_timeout_s / 10))
            oldest = self.silence.oldest()
            for replica in list(self.replicas.by_name.values()):
                connection = replica.connection
                if connection is None:
                    continue
                connection.send("heartbeat")
                if connection.last_received < oldest:
                    logger.warning("engine replica %s is silent", replica.name)
                    connection.abort()

    def _on_message(self, replica: ReplicaHandle, message: list[Any]) -> None:
        match message[0]:
            case "outputs":
                for wire in message[1]:
                    self._on_output(replica, wire)
            case "reply":
                reply = replica.replies.pop(message[1], None)
                if message[2] == QUEUE_FULL and len(message) > 3:
                    replica.queue_wait_s = message[3]
                if reply is not None and not reply.done():
                    reply.set_result(message[2])
            case "draining":
                replica.is_draining = True
                self.replicas.list_now.set()
            case "handshake" | "heartbeat":
                was_swapping, replica.status = replica.is_swapping, message[1]
                if replica.is_swapping and not was_swapping:
                    self._leave_swapping(replica)
                others = message[1]["requests"] - len(replica.in_flight)
                replica.num_other_requests = max(0, others)
                if not replica.is_ready:
                    replica.is_ready = True
                    self._spawn(self.replicas.notify_ready())

    def _on_disconnected(self, replica: ReplicaHandle) -> None:
        """Migrates its requests to other replicas."""
        if replica.is_listed and not replica.is_draining:
            logger.warning("engine replica %s disconnected", replica.name)
        replica.is_ready = False
        self.replicas.remove(replica)
        self.replicas.list_now.set()
        for reply in replica.replies.values():
            if not reply.done():
                reply.set_result(NOT_HERE)
        entries, replica.in_flight = list(replica.in_flight.values()), {}
        for entry in entries:
            entry.replica = None
            if not entry.is_dispatching:  # else the task that dispatches it chooses another
                self._spawn(self._migrate(entry))

    def _on_output(self, replica: ReplicaHandle, wire: dict[str, Any]) -> None:
        entry = replica.in_flight.get(wire["id"])
        if entry is None:
            return  # aborted or migrated
        # The stream knows the request by its own id.
        output = RequestOutput.from_wire({**wire, "id": entry.request.id})
        if output.finish == "error" and (output.error or "").startswith(WEIGHTS_REPLACED):
            entry.detach()
            if not entry.is_dispatching:
                self._spawn(self._migrate(entry))
            return
        entry.tokens += output.tokens
        entry.weight_version = entry.weight_version or output.weight_version
        if output.finish is not None:
            del replica.in_flight[wire["id"]]
            entry.replica = None
            entry.is_closed = True
        entry.stream.push(output)

    # ---- dispatch of requests

    def _withdraw(self, entry: InFlightRequest, replica: ReplicaHandle) -> None:
        assert replica.connection is not None
        replica.connection.send("abort", [entry.wire_id])
        entry.detach()

    def _leave_swapping(self, replica: ReplicaHandle) -> None:
        for entry in list(replica.in_flight.values()):
            if not entry.is_dispatching and self.replicas.may_leave(entry, replica):
                self._withdraw(entry, replica)
                self._spawn(self._migrate(entry))

    async def _migrate(self, entry: InFlightRequest) -> None:
        entry.num_dispatches += 1
        entry.is_dispatching = True
        try:
            await self._dispatch(entry, wait_for_capacity=True)
        except WeightsReplacedError as error:
            entry.stream.fail(entry.request.id, UnavailableError(str(error)))
        except (UnavailableError, EngineFull) as error:
            reason = f"the engine was lost and no other took over: {error}"
            entry.stream.fail(entry.request.id, UnavailableError(reason))
        except Exception as error:
            logger.exception("request %s could not be migrated", entry.request.id)
            reason = f"the engine was lost: {error}"
            entry.stream.fail(entry.request.id, UnavailableError(reason))

    async def _dispatch(self, entry: InFlightRequest, wait_for_capacity: bool = False) -> None:
        """Submits a request to a replica, to another if that one fails, until the deadline.

        Raises UnavailableError, ValueError, WeightsReplacedError if no replica has the weights
        that it has begun with, or EngineFull when every queue is full. With
        ``wait_for_capacity``, for a request that has sent tokens to the client, it waits instead.
        """
        timeout = self.deadline_s
        if entry.request.deadline is not None:
            timeout = min(timeout, entry.request.deadline - time.monotonic())
        deadline = time.monotonic() + timeout
        full: set[str] = set()
        while not entry.is_closed:
            replica = await self.replicas.choose(entry, full, deadline, wait_for_capacity)
            reply = await self._try_submit(entry, replica)
            if reply == ACCEPTED and (entry.replica is replica or entry.is_closed):
                if entry.replica is replica and self.replicas.may_leave(entry, replica):
                    self._withdraw(entry, replica)
                    entry.num_dispatches += 1
                    continue
                entry.is_dispatching = False
                return
            entry.detach()
            entry.num_dispatches += 1
            if reply == QUEUE_FULL:
                full.add(replica.name)
            elif reply == OTHER_WEIGHTS or (reply == ACCEPTED and replica.is_usable):
                if time.monotonic() > deadline:
                    raise UnavailableError(f"engine replica {replica.name} changes its weights")
                await asyncio.sleep(0.02)  # its next heartbeat names them
            elif reply not in (ACCEPTED, NOT_HERE):
                raise ValueError(reply)
            elif not entry.is_closed:
                # It is dead or stopping, and its connection will close; another one is tried now.
                replica.is_listed = False
                await asyncio.sleep(0.05)

    async def _try_submit(self, entry: InFlightRequest, replica: ReplicaHandle) -> str:
        """Submits a request to one replica and returns the reply."""
        assert replica.connection is not None
        entry.replica, entry.is_dispatching = replica, True
        wire_id = entry.wire_id
        replica.in_flight[wire_id] = entry
        request = dataclasses.replace(
            entry.request,
            id=wire_id,
            output_token_ids=tuple(entry.tokens),
            weight_version=entry.weight_version,
        )
        future = replica.replies[wire_id] = asyncio.get_running_loop().create_future()
        try:
            replica.connection.send("submit", request.to_wire())
            async with asyncio.timeout(CALL_TIMEOUT_S):
                reply = await future
        except TimeoutError:
            replica.connection.send("abort", [wire_id])
            reply = NOT_HERE
        finally:
            replica.replies.pop(wire_id, None)
        if reply == ACCEPTED:
            self.replicas.router.record(
                replica.name, entry.request.prompt, entry.request.cache_scope
            )
        return reply

    def _abort(self, entry: InFlightRequest) -> None:
        entry.is_closed = True
        replica = entry.replica
        if replica is None:
            return
        entry.detach()
        if replica.connection is not None:
            replica.connection.send("abort", [entry.wire_id])
