"""A fleet of engines that die and come back, without Ray."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve.exceptions import RayServeException

from nanochat_ray.engine.request import EngineStoppedError, Request
from nanochat_ray.on_ray import fleet as fleet_module
from nanochat_ray.on_ray.fleet import EndpointEngine, Fleet
from nanochat_ray.on_ray.fleet_engine import EngineSpec
from tests.on_ray.test_fleet_engine import SPEC


class Engine:
    """Answers with the id of the request; fails in its first ``num_failures`` calls."""

    def __init__(self, num_failures: int = 0, *, comes_back: bool = True):
        self.num_failures, self.comes_back, self.num_calls = num_failures, comes_back, 0
        self.sizes: list[int] = []
        """Of the calls."""

    def run(self, spec: EngineSpec, version: int, weights: Any, wires: Sequence[Any]) -> list[Any]:
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise EngineStoppedError("gone")
        self.sizes.append(len(wires))
        return [
            {"id": w["id"], "tokens": [int(w["id"])], "weight_version": str(version)} for w in wires
        ]

    def is_ready(self) -> bool:
        return self.comes_back


def requests(count: int) -> list[Request]:
    return [Request(id=str(i), prompt=[1]) for i in range(count)]


def answers(fleet: Fleet, count: int) -> list[int]:
    return sorted(output.tokens[0] for output in fleet.run(requests(count)))


def fleet_of(*engines: Engine) -> Fleet:
    return Fleet(engines, SPEC)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "POLL_S", 0.01)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_each_request_is_answered_once(count: int) -> None:
    assert answers(fleet_of(Engine(), Engine()), count) == list(range(count))


def test_calls_have_equal_parts_up_to_a_bound() -> None:
    """Four calls for two engines; of a source without a length, four times what runs at once."""
    engines = Engine(), Engine()
    assert len(answers(fleet_of(*engines), 40)) == 40
    assert sorted(engines[0].sizes + engines[1].sizes) == [10, 10, 10, 10]
    alone = Engine()
    outputs = list(fleet_of(alone).run(iter(requests(70))))
    assert sorted(alone.sizes) == [6, 32, 32]
    assert sorted(output.tokens[0] for output in outputs) == list(range(70))


def test_other_engines_take_the_requests() -> None:
    dead, alive = Engine(99, comes_back=False), Engine()
    fleet = fleet_of(dead, alive)
    assert answers(fleet, 9) == list(range(9))
    assert (dead.num_calls, alive.num_calls, fleet.num_lost_engines) == (1, 3, 1)
    assert "reviver" not in [thread.name for thread in threading.enumerate()]
    # In a later call it is back.
    dead.num_failures, dead.comes_back = 0, True
    alive.num_failures = 99
    assert answers(fleet, 9) == list(range(9))


def test_an_engine_that_comes_back_continues() -> None:
    fleet = fleet_of(Engine(2))
    assert answers(fleet, 5) == list(range(5))
    assert fleet.num_lost_engines == 2


def test_a_fleet_without_engines_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "RESTART_DEADLINE_S", 0.02)
    engines = [Engine(1, comes_back=False), Engine(1, comes_back=False)]
    with pytest.raises(RuntimeError, match="all 2 engines have died"):
        answers(fleet_of(*engines), 4)


def test_an_error_leaves_the_engine_to_others() -> None:
    """A bad request, say: the other threads of the call do not wait for ever."""

    class Refuses(Engine):
        def run(self, *call: Any) -> list[Any]:
            if self.num_calls == 0:
                self.num_calls += 1
                raise ValueError("prompt=[] is not allowed")
            return super().run(*call)

    fleet = fleet_of(Refuses())
    with pytest.raises(ValueError, match="prompt"):
        answers(fleet, 4)
    assert answers(fleet, 4) == list(range(4))


class Handle:
    """Of a deployment whose calls have these outcomes."""

    def __init__(self, *outcomes: Any):
        self.outcomes = list(outcomes)
        self.run_guest = self.status = self

    def remote(self, *_: Any) -> Handle:
        return self

    def result(self, timeout_s: float) -> Any:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def endpoint_engine(*outcomes: Any) -> EndpointEngine:
    handle: Any = Handle(*outcomes)
    return EndpointEngine("app", handle)


def test_a_timeout_of_the_replica_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_module, "num_replicas", lambda application: 1)
    assert endpoint_engine(TimeoutError(), TimeoutError(), ["a"]).run(SPEC, 1, [], []) == ["a"]
    error = RayTaskError("f", "trace", TimeoutError("in the replica"), "p", 1, "127.0.0.1")
    with pytest.raises(TimeoutError):
        endpoint_engine(error.as_instanceof_cause(), ["a"]).run(SPEC, 1, [], [])


@pytest.mark.parametrize(
    "error", [TimeoutError(), RayServeException("it restarts"), ActorUnavailableError("x", None)]
)
def test_a_call_that_fails_is_not_ready(error: Exception) -> None:
    assert not endpoint_engine(error).is_ready()
    assert endpoint_engine({}).is_ready()


def test_engines_of_an_endpoint_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    states: dict[str, int] = {"RUNNING": 2, "STARTING": 1}
    engine = SimpleNamespace(replica_states=states)
    applications = {
        "app": SimpleNamespace(deployments={"engine": engine}),
        "other": SimpleNamespace(deployments={}),
    }
    monkeypatch.setattr(
        fleet_module.serve, "status", lambda: SimpleNamespace(applications=applications)
    )
    assert fleet_module.num_replicas("app") == 3
    states.clear()
    assert fleet_module.num_replicas("app") == 1  # one that will start
    with pytest.raises(ValueError, match="endpoint='other' is no application of nanochat-ray"):
        fleet_module.num_replicas("other")
    with pytest.raises(ValueError, match=r"endpoint='x' is no Serve .*; there is app, other"):
        fleet_module.num_replicas("x")
    applications.clear()
    with pytest.raises(ValueError, match="there is none"):
        fleet_module.num_replicas("x")
