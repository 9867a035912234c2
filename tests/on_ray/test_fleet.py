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
from nanochat_ray.on_ray import rl
from nanochat_ray.on_ray.rl import EndpointEngine, Fleet


class Engine:
    """Answers with the id of the request; fails in its first ``num_failures`` calls."""

    def __init__(self, num_failures: int = 0, *, comes_back: bool = True):
        self.num_failures, self.comes_back, self.num_calls = num_failures, comes_back, 0

    def generate(self, version: int, weights: Sequence[Any], requests: Sequence[Any]) -> list[Any]:
        self.num_calls += 1
        if self.num_calls <= self.num_failures:
            raise EngineStoppedError("gone")
        return [[[int(wire["id"])], [0.0], "stop", version] for wire in requests]

    def is_ready(self) -> bool:
        return self.comes_back


def answers(fleet: Fleet, count: int) -> list[int]:
    rollouts = fleet.generate([Request(id=str(i), prompt=[1]) for i in range(count)])
    return [rollout.tokens[0] for rollout in rollouts]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl, "POLL_S", 0.01)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_rollouts_keep_the_order_of_requests(count: int) -> None:
    assert answers(Fleet([Engine(), Engine()]), count) == list(range(count))


def test_other_engines_take_the_requests() -> None:
    dead, alive = Engine(99, comes_back=False), Engine()
    fleet = Fleet([dead, alive])
    assert answers(fleet, 9) == list(range(9))
    assert (dead.num_calls, alive.num_calls, fleet.num_lost_engines) == (1, 3, 1)
    assert "reviver" not in [thread.name for thread in threading.enumerate()]
    # In a later call it is back.
    dead.num_failures, dead.comes_back = 0, True
    alive.num_failures = 99
    assert answers(fleet, 9) == list(range(9))


def test_an_engine_that_comes_back_continues() -> None:
    fleet = Fleet([Engine(2)])
    assert answers(fleet, 5) == list(range(5))
    assert fleet.num_lost_engines == 2


def test_a_fleet_without_engines_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl, "RESTART_DEADLINE_S", 0.02)
    engines = [Engine(1, comes_back=False), Engine(1, comes_back=False)]
    with pytest.raises(RuntimeError, match="all 2 rollout engines have died"):
        answers(Fleet(engines), 4)


def test_an_error_leaves_the_engine_to_others() -> None:
    """A bad request, say: the other threads of the call do not wait for ever."""

    class Refuses(Engine):
        def generate(self, version: int, weights: Any, requests: Sequence[Any]) -> list[Any]:
            if self.num_calls == 0:
                self.num_calls += 1
                raise ValueError("prompt=[] is not allowed")
            return super().generate(version, weights, requests)

    fleet = Fleet([Refuses()])
    with pytest.raises(ValueError, match="prompt"):
        answers(fleet, 4)
    assert answers(fleet, 4) == list(range(4))


class Handle:
    """Of a deployment whose calls have these outcomes."""

    def __init__(self, *outcomes: Any):
        self.outcomes = list(outcomes)
        self.generate_rollouts = self.status = self

    def remote(self, *_: Any) -> Handle:
        return self

    def result(self, timeout_s: float) -> Any:
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def endpoint_engine(*outcomes: Any) -> EndpointEngine:
    handle: Any = Handle(*outcomes)
    config: Any = None
    return EndpointEngine("app", handle, config, config)


def test_a_timeout_of_the_replica_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl, "num_replicas", lambda application: 1)
    assert endpoint_engine(TimeoutError(), TimeoutError(), ["a"]).generate(1, [], []) == ["a"]
    error = RayTaskError("f", "trace", TimeoutError("in the replica"), "p", 1, "127.0.0.1")
    with pytest.raises(TimeoutError):
        endpoint_engine(error.as_instanceof_cause(), ["a"]).generate(1, [], [])


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
    monkeypatch.setattr(rl.serve, "status", lambda: SimpleNamespace(applications=applications))
    assert rl.num_replicas("app") == 3
    states.clear()
    assert rl.num_replicas("app") == 1  # one that will start
    with pytest.raises(ValueError, match="endpoint='other' is no application of nanochat-ray"):
        rl.num_replicas("other")
    with pytest.raises(ValueError, match=r"endpoint='x' is no Serve .*; there is app, other"):
        rl.num_replicas("x")
    applications.clear()
    with pytest.raises(ValueError, match="there is none"):
        rl.num_replicas("x")
