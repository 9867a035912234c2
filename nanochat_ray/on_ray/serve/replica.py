"""The engine side of Serve: one ``EngineLoop``, and one connection to each ingress.

The event loop of a replica only moves messages; the model runs in the engine's own thread, which
hands over each step's outputs with one call, and each ingress gets its batch as one message.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import secrets
import time
from collections.abc import Coroutine, Sequence
from typing import Any

import ray.util
from ray import serve

from nanochat_ray.checkpoint import follow
from nanochat_ray.checkpoint.checkpoint import load, load_config, weight_version
from nanochat_ray.checkpoint.lease import Lease
from nanochat_ray.config import from_json
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.loading import engine_from_run
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.request import (
    EngineFull,
    Request,
    RequestOutput,
    WeightsReplacedError,
)
from nanochat_ray.machine import engine_threads, run_in_temporary_thread
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.on_ray.fleet_engine import GuestEngine
from nanochat_ray.on_ray.serve.connection import (
    ACCEPTED,
    HEARTBEAT_S,
    LIVENESS_TIMEOUT_S,
    NOT_HERE,
    OTHER_WEIGHTS,
    QUEUE_FULL,
    Connection,
    Handshakes,
    SilenceLimit,
)
from nanochat_ray.on_ray.serve.metrics import RaySink
from nanochat_ray.retry import retry
from nanochat_ray.serve.collector import freeze_gc
from nanochat_ray.serve.metrics import EngineMetrics
from nanochat_ray.storage import Store

logger = logging.getLogger(__name__)

DRAIN_S = 25.0
"""How long a replica that Serve stops may finish its requests; less than
``graceful_shutdown_timeout_s`` of the deployment."""
NICENESS = 10
"""Of an engine's threads on a CPU, above that of Ray's workers (``ports.SETTINGS``)."""


class EngineReplica:
    """One model in one process.

    ``user_config`` names the ``checkpoint``; another of the same architecture is swapped in place
    when the requests that run are complete (``drain_s``). For one of another architecture an engine
    is started beside the old one, which finishes its requests. With ``follow`` ("latest" or "best")
    the checkpoint is that of the endpoint, and ``follow.FollowDeployment`` swaps it. A step that
    takes longer than ``liveness_timeout_s`` counts as hung (``engine.step_clock``). A
    checkpoint that cannot be served is refused: ``status`` says why, and the old one stays.
    """

    def __init__(
        self,
        storage: str,
        run: str,
        engine: dict[str, Any],
        device: str,
        threads: int,
        sharing: int = 1,
        name: str = "",
        model: str = "",
        host: str = "",
        drain_s: float = 30.0,
        liveness_timeout_s: float = LIVENESS_TIMEOUT_S,
    ):
        self.run = Store.at(storage).child("runs", run)
        self.drain_s, self.liveness_timeout_s = drain_s, liveness_timeout_s
        self._silence = SilenceLimit(liveness_timeout_s)
        self.config = from_json(EngineConfig, engine)
        self.device = device
        self.threads, self.sharing = threads, sharing
        self.name = name or serve.get_replica_context().replica_tag
        self.model = model or self.name
        self.host = host or ray.util.get_node_ip_address()
        self.checkpoint = ""
        self.refusals: dict[str, str] = {}
        """The checkpoint that was deployed and is not served, and why."""
        self.tokenizer = ""
        self.architecture: ModelConfig | None = None
        self.lease = Lease(self.run, self.name)
        self._swap_lock = asyncio.Lock()
        self.engine: EngineLoop | None = None
        self.secret = secrets.token_hex(32)
        self.server: asyncio.Server | None = None
        self.connections: set[Connection] = set()
        self.handshakes = Handshakes()
        self.owners: dict[str, tuple[Connection, EngineLoop]] = {}
        """The connection and the engine of each request, by request id."""
        self._guest = GuestEngine(device)
        self._tasks: set[asyncio.Task[None]] = set()
        self._metrics = EngineMetrics(RaySink(self.model))
        freeze_gc()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        name, target = user_config.get("checkpoint", ""), user_config.get("follow")
        if target and self.engine is not None:
            return
        if target:
            name = await asyncio.to_thread(self._first_checkpoint, target)
        await self.listen()
        version = self.engine.weight_version if self.engine is not None else ""
        try:
            await self._serve_when_readable(name)
        except (ValueError, OSError, RuntimeError) as error:
            if self.engine is None:
                raise
            # Serve would end this replica and every other one, and start none that works.
            self.refusals = {name: str(error)}
            logger.error("checkpoint %s is refused: %s", name, error)
            if self.engine.weight_version != version:  # it failed while they were replaced
                await self._serve_when_readable(self.checkpoint)
        else:
            self.refusals = {}

    async def _serve_when_readable(self, name: str) -> None:
        """``_serve``, again while storage is away: Serve would not call again, and would start a
        replica that cannot start again at once, which costs a core."""
        loop = asyncio.get_running_loop()

        def serve() -> None:
            asyncio.run_coroutine_threadsafe(self._serve(name), loop).result()

        await asyncio.to_thread(retry, serve, f"checkpoint {name}")

    def _first_checkpoint(self, target: follow.Target) -> str:
        return retry(
            lambda: follow.first_checkpoint(self.run, self.model, target),
            "the checkpoint to begin with",
        )

    async def swap(self, replica: str, name: str) -> str | None:
        """Serves another checkpoint, if ``replica`` is this one. "" when it does, else the reason
        why not; None for another replica."""
        if replica != self.name:
            return None
        try:
            await self._serve(name)
        except (ValueError, RuntimeError) as error:
            return str(error)
        return ""

    async def _serve(self, name: str) -> None:
        """Raises ValueError if the checkpoint cannot be served, OSError if it cannot be read; then
        nothing has changed. RuntimeError if the engine fails, or memory for another one."""
        async with self._swap_lock:
            loop, old = asyncio.get_running_loop(), self.engine
            if old is None or not await self._swap_in_place(old, name):
                self.engine = await asyncio.to_thread(
                    run_in_temporary_thread, self._start_engine, name, loop
                )
                if old is not None:
                    self._spawn(self._retire(old))
            self.checkpoint = name
            self._send_status()
            await asyncio.to_thread(self.lease.hold, [name])

    async def _swap_in_place(self, engine: EngineLoop, name: str) -> bool:
        """False if the architecture is another one."""
        if await asyncio.to_thread(weight_version, self.run, name) == engine.weight_version:
            return True
        new = await asyncio.to_thread(load, self.run, name, optimizer=False)
        if new.tokenizer.fingerprint != self.tokenizer:
            raise ValueError(f"checkpoint={name!r} has another tokenizer than the one in use")
        if new.model_config != self.architecture:
            return False
        version = await asyncio.to_thread(weight_version, self.run, name)
        swap = engine.swap_weights(new.weights, version, self.drain_s)
        self._send_status()  # the ingresses prefer other replicas now
        await asyncio.wrap_future(swap)
        return True

    async def listen(self) -> None:
        """Starts to accept connections of ingresses."""
        if self.server is not None:
            return

        def connection() -> Connection:
            return Connection(
                self._on_message,
                self._on_disconnected,
                is_trusted=False,
                on_connected=self.handshakes.begin,
            )

        self.server = await asyncio.get_running_loop().create_server(connection, self.host, 0)
        self._spawn(self._send_heartbeats())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start_engine(self, name: str, loop: asyncio.AbstractEventLoop) -> EngineLoop:
        import torch

        torch.set_num_threads(self.threads or engine_threads(self.sharing))
        engine, tokenizer = engine_from_run(
            self.run, self.config, name, self.device, self.tokenizer
        )
        self.tokenizer = tokenizer.fingerprint
        self.architecture = load_config(self.run, name).model

        def on_step(outputs: list[RequestOutput]) -> None:  # in the engine's thread
            loop.call_soon_threadsafe(self._deliver, outputs)

        # Else an ingress on the same cores gets too little of them to refuse a flood.
        niceness = NICENESS if self.device == "cpu" else 0
        engine_loop = EngineLoop(engine, on_step, niceness)
        engine_loop.start()
        return engine_loop

    async def _retire(self, engine: EngineLoop) -> None:
        while any(engine is has for _, has in self.owners.values()):
            await asyncio.sleep(0.2)
        await asyncio.to_thread(engine.stop)

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        batches: dict[Connection, list[dict[str, Any]]] = {}
        for output in outputs:
            owner = self.owners.get(output.request_id)
            if owner is None:
                continue  # aborted while the step ran
            if output.finish is not None:
                del self.owners[output.request_id]
            batches.setdefault(owner[0], []).append(output.to_wire())
        for connection, batch in batches.items():
            connection.send("outputs", batch)

    # ---- messages of an ingress

    def _on_message(self, connection: Connection, message: list[Any]) -> None:
        if not connection.is_trusted:
            kind, secret, _ = message
            if kind == "handshake" and hmac.compare_digest(secret, self.secret):
                connection.is_trusted = True
                self.handshakes.end(connection)
                self.connections.add(connection)
                connection.send("handshake", self.status())
        elif message[0] == "submit":
            self._submit(connection, message[1])
        elif message[0] == "abort":
            self._abort(message[1])
        # A heartbeat is noted by ``Connection.last_received``.

    def _on_disconnected(self, connection: Connection) -> None:
        """Aborts the requests of an ingress that is gone."""
        self.handshakes.end(connection)
        self.connections.discard(connection)
        self._abort([name for name, (owner, _) in self.owners.items() if owner is connection])

    def _submit(self, connection: Connection, wire: dict[str, Any]) -> None:
        if self.engine is None:
            connection.send("reply", wire["id"], NOT_HERE)
            return
        self.owners[wire["id"]] = connection, self.engine
        self._spawn(self._start_request(connection, wire, self.engine))

    async def _start_request(
        self, connection: Connection, wire: dict[str, Any], engine: EngineLoop
    ) -> None:
        reply, details = ACCEPTED, list[float]()
        try:
            request = Request.from_wire(wire)
            if compiling := engine.prepare(request):  # other requests continue
                await asyncio.shield(asyncio.wrap_future(compiling))
            if request.id not in self.owners:
                return  # aborted
            engine.submit(request)
        except EngineFull as error:
            reply, details = QUEUE_FULL, [error.retry_after_s]
        except WeightsReplacedError:
            reply = OTHER_WEIGHTS
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            reply = str(error) or type(error).__name__
        except RuntimeError:
            # The engine is dead: ``check_health`` fails, and Serve replaces this replica.
            reply = NOT_HERE
        if reply != ACCEPTED:
            del self.owners[wire["id"]]
        connection.send("reply", wire["id"], reply, *details)

    def _abort(self, requests: Sequence[str]) -> None:
        for request in requests:
            _, engine = self.owners.pop(request, (None, None))
            if engine is not None:
                engine.abort(request)

    # ---- calls of Serve and of the ingresses through Ray

    async def endpoint(self) -> dict[str, Any]:
        """The address for ingresses, and the secret that they must send."""
        is_listening = self.server is not None and not self.is_hung
        address = self.server.sockets[0].getsockname()[:2] if self.server and is_listening else None
        return {
            "replica": self.name,
            "address": address,
            "secret": self.secret,
            "weight_version": self.engine.weight_version if self.engine is not None else "",
        }

    async def run_guest(self, *call: Any) -> list[Any]:
        """``GuestEngine.run``, for reinforcement learning or an evaluation."""
        return await self._guest.run(self.engine, *call)

    @property
    def is_hung(self) -> bool:
        return self.engine is not None and self.engine.is_hung(self.liveness_timeout_s)

    def status(self) -> dict[str, Any]:
        """Name, checkpoint and load."""
        return {
            "replica": self.name,
            "device": self.device,
            "checkpoint": self.checkpoint,
            "refused": self.refusals,
            "weight_version": self.engine.weight_version if self.engine is not None else "",
            "is_swapping": self.engine is not None and self.engine.is_swapping,
            "requests": len(self.owners),
            "has_guest": self._guest.is_here,
            **(dataclasses.asdict(self.engine.stats()) if self.engine is not None else {}),
        }

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For ``autoscaling.policy``."""
        if self.engine is None:
            return {}
        stats = self.engine.stats()
        return {
            name: getattr(stats, name) for name in ("running", "waiting", "slots", "kv_cache_usage")
        }

    async def _send_heartbeats(self) -> None:
        while True:
            self._metrics.update(self.name, self.status())
            self._send_status()
            self._abort_dead_connections()
            await asyncio.sleep(min(HEARTBEAT_S, self.liveness_timeout_s / 10))

    def _send_status(self) -> None:
        status = self.status()
        for connection in self.connections:
            connection.send("heartbeat", status)

    def _abort_dead_connections(self) -> None:
        """Aborts those of ingresses that are silent; all, if the engine hangs, so that its requests
        are migrated."""
        oldest = self._silence.oldest()
        if self.is_hung and self.connections:
            logger.error("a step of the engine hangs: its requests are migrated")
        for connection in list(self.connections):
            if connection.last_received < oldest or self.is_hung:
                connection.abort()

    async def check_health(self) -> None:
        """Serve replaces a replica whose engine thread has died or hangs."""
        if self.is_hung:
            raise RuntimeError("a step of the engine hangs")
        if self.engine is None or self.engine.failure is not None:
            reason = "not started" if self.engine is None else self.engine.failure
            raise RuntimeError(f"the engine is dead: {reason}")

    async def __del__(self) -> None:
        if self.server is not None:
            self.server.close()
        for connection in self.connections:
            connection.send("draining")
        until = time.monotonic() + DRAIN_S
        while self.owners and time.monotonic() < until:
            await asyncio.sleep(0.1)
        for connection in list(self.connections):
            connection.close()  # the ingresses migrate the remaining requests
        for task in self._tasks:
            task.cancel()
        if self.engine is not None:
            with contextlib.suppress(RuntimeError):
                await asyncio.to_thread(self.engine.stop)
        await asyncio.to_thread(self.lease.release)
