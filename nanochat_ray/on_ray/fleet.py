"""Many engines on Ray as one ``OfflineEngine``: actors, or the replicas of an endpoint.

Weights go through the object store, once for each version, and every call names theirs. An output
is a pure function of its request and the weights, so requests may run on any engine and more than
once: when an engine dies, its requests run on the others, with the same tokens.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from typing import Any, Protocol

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.serve.handle import DeploymentHandle
from torch import Tensor

from nanochat_ray.engine.request import EngineStoppedError, Request, RequestOutput
from nanochat_ray.on_ray.fleet_engine import EngineSpec, FleetEngine
from nanochat_ray.on_ray.serve.endpoints import CALL_ERRORS
from nanochat_ray.on_ray.thread import thread_beside

CALLS_PER_ENGINE = 2
"""Into which the requests are divided: a fast engine takes more of them."""
SLOTFULS_PER_CALL = 4
"""Of requests. At the end of a call the last ones run alone, so a call should not be short; a
command that is killed answers those of its calls again, so it should not be long."""
RESTART_DEADLINE_S = 180.0
"""How long requests wait while no engine is alive."""
POLL_S = 1.0
LOST = (RayActorError, EngineStoppedError)
"""What a call raises whose engine has died or ends: another engine may take it."""


class RemoteEngine(Protocol):
    def run(
        self, spec: EngineSpec, version: int, weights: Sequence[Any], wires: Sequence[Any]
    ) -> list[Any]:
        """``FleetEngine.run``; one of LOST if the engine dies."""
        ...

    def is_ready(self) -> bool:
        """Whether it answers within ``POLL_S``."""
        ...


class ActorEngine:
    """A ``FleetEngine``, which Ray restarts when it dies."""

    def __init__(self, actor: Any):
        self.actor = actor

    def run(self, *call: Any) -> list[Any]:
        outputs: list[Any] = ray.get(self.actor.run.remote(*call))
        return outputs

    def is_ready(self) -> bool:
        try:
            ray.get(self.actor.ping.remote(), timeout=POLL_S)
        except (*LOST, GetTimeoutError):
            return False
        return True


class EndpointEngine:
    """A replica of a Serve application, another one in each call: Serve chooses."""

    def __init__(self, application: str, handle: DeploymentHandle):
        """``handle``: of the application's engines. All engines of a fleet share one, which knows
        how many calls each replica has."""
        self.application, self._handle = application, handle

    def run(self, *call: Any) -> list[Any]:
        response = self._handle.run_guest.remote(*call)
        while True:
            try:
                outputs: list[Any] = response.result(timeout_s=10 * POLL_S)
                return outputs
            except TimeoutError as error:
                if isinstance(error, RayTaskError):
                    raise  # by the replica, not by this wait
                # Guests may wait for users for as long as they like.
                num_replicas(self.application)

    def is_ready(self) -> bool:
        try:
            self._handle.status.remote().result(timeout_s=POLL_S)
        except CALL_ERRORS:
            return False
        return True


def num_replicas(application: str) -> int:
    """Of the engines of a Serve application. ValueError if it does not run."""
    applications = serve.status().applications
    if application not in applications:
        others = ", ".join(applications) or "none"
        raise ValueError(
            f"endpoint={application!r} is no Serve application here; there is {others}"
        )
    engines = applications[application].deployments.get("engine")
    if engines is None:
        raise ValueError(f"endpoint={application!r} is no application of nanochat-ray serve")
    return max(1, sum(engines.replica_states.values()))


def endpoint_device(application: str) -> str:
    """cpu or cuda: what its replicas compute on."""
    status = serve.get_deployment_handle("engine", application).status.remote()
    device: str = status.result(timeout_s=RESTART_DEADLINE_S)["device"]
    return device.partition(":")[0]


class Fleet:
    """Implements ``engine.offline.OfflineEngine``, for one caller at a time."""

    def __init__(self, engines: Sequence[RemoteEngine], spec: EngineSpec, device_type: str = "cpu"):
        """``device_type``: of the engines."""
        self.config, self.device_type = spec.config, device_type
        self.max_model_len = spec.config.max_model_len or spec.model.sequence_len
        self._spec, self._engines = spec, list(engines)
        self._idle: queue.SimpleQueue[RemoteEngine] = queue.SimpleQueue()
        for engine in engines:
            self._idle.put(engine)
        self._times_of_death: dict[RemoteEngine, float] = {}
        """Of engines that have not come back."""
        self._version = -1
        self._weights: Any = None
        self.num_lost_engines = 0

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        if version != self._version:
            arrays = {name: tensor.detach().cpu().numpy() for name, tensor in weights.items()}
            self._weights, self._version = ray.put(arrays), version

    def run(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        """The outputs of a call come together. It has an equal part of ``requests`` if their number
        is known, and at most ``SLOTFULS_PER_CALL`` times what its engine runs at once."""
        # Not longer than this call: a thread of its own would start a Ray when there is none.
        with thread_beside(self._revive, "reviver"):
            pool = ThreadPoolExecutor(len(self._engines), "fleet")
            calls: set[Future[list[RequestOutput]]] = set()
            try:
                for chunk in self._chunks(requests):
                    calls.add(pool.submit(self._call, chunk))
                    if len(calls) > CALLS_PER_ENGINE * len(self._engines):
                        ready, calls = wait(calls, return_when=FIRST_COMPLETED)
                        yield from itertools.chain.from_iterable(call.result() for call in ready)
                for call in as_completed(calls):
                    yield from call.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _chunks(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        size = SLOTFULS_PER_CALL * self.config.max_num_seqs
        if isinstance(requests, Sequence):
            size = min(size, -(-len(requests) // (CALLS_PER_ENGINE * len(self._engines))))
        source = iter(requests)
        while chunk := list(itertools.islice(source, size)):
            yield chunk

    def _call(self, requests: Sequence[Request]) -> list[RequestOutput]:
        wires = [request.to_wire() for request in requests]
        while True:
            engine = self._next_engine()
            try:
                answers = engine.run(self._spec, self._version, [self._weights], wires)
            except LOST:
                self.num_lost_engines += 1
                self._times_of_death[engine] = time.monotonic()
                continue
            except BaseException:
                self._idle.put(engine)  # it lives, and other threads wait for one
                raise
            self._idle.put(engine)
            outputs = [RequestOutput.from_wire(wire) for wire in answers]
            assert all(output.weight_version == str(self._version) for output in outputs)
            return outputs

    def _next_engine(self) -> RemoteEngine:
        while True:
            try:
                return self._idle.get(timeout=POLL_S)
            except queue.Empty:
                times = list(self._times_of_death.values())
                if len(times) < len(self._engines):
                    continue  # one of the others is busy
                if time.monotonic() - max(times) > RESTART_DEADLINE_S:
                    raise RuntimeError(
                        f"all {len(times)} engines have died, and none has come back "
                        f"within {RESTART_DEADLINE_S:.0f} s"
                    ) from None

    def _revive(self, end: threading.Event) -> None:
        """Until ``end``, gives engines that are back their turns again."""
        while not end.wait(POLL_S / 5):
            for engine in list(self._times_of_death):
                if engine.is_ready():
                    del self._times_of_death[engine]
                    self._idle.put(engine)


def endpoint_engines(application: str) -> list[RemoteEngine]:
    """One for each replica of a Serve application. ValueError if it does not run."""
    count = num_replicas(application)
    handle = serve.get_deployment_handle("engine", application)
    return [EndpointEngine(application, handle) for _ in range(count)]


@contextlib.contextmanager
def actor_engines(count: int, *, gpus: bool, threads: int) -> Iterator[list[RemoteEngine]]:
    """``count`` actors, which Ray restarts when they die."""
    actor: Any = ray.remote(num_cpus=threads, num_gpus=1 if gpus else 0, max_restarts=-1)(
        FleetEngine
    )
    actors = [actor.remote(gpus, threads) for _ in range(count)]
    try:
        yield [ActorEngine(actor) for actor in actors]
    finally:
        for handle in actors:
            ray.kill(handle)
