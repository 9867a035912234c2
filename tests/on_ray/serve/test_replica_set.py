"""Which replicas may get a request, and how long it waits for one."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from nanochat_ray.engine.request import EngineFull, Request, SamplingParams, WeightsReplacedError
from nanochat_ray.on_ray.serve.replica_set import InFlightRequest, ReplicaHandle, ReplicaSet
from nanochat_ray.on_ray.serve.routing import BLOCK_SIZE
from nanochat_ray.serve.client import OutputStream, UnavailableError


def entry(weight_version: str = "") -> InFlightRequest:
    request = Request(id="r", prompt=[1, 2], params=SamplingParams(max_tokens=2))
    return InFlightRequest(request, OutputStream(), weight_version=weight_version)


def replica(name: str, version: str = "v1", *, is_swapping: bool = False) -> ReplicaHandle:
    status = {"weight_version": version, "is_swapping": is_swapping}
    return ReplicaHandle(name, is_ready=True, status=status)


def replica_set(*replicas: ReplicaHandle) -> ReplicaSet:
    result = ReplicaSet()
    result.by_name = {r.name: r for r in replicas}
    return result


def choose(
    replicas: ReplicaSet,
    request: InFlightRequest,
    full: set[str] | None = None,
    seconds: float = 0.0,
    wait_for_capacity: bool = False,
) -> str:
    deadline = time.monotonic() + seconds
    work = replicas.choose(request, full or set(), deadline, wait_for_capacity)
    return asyncio.run(work).name


def test_new_requests_avoid_a_replica_that_swaps_its_weights() -> None:
    replicas = replica_set(replica("a", is_swapping=True), replica("b"))
    replicas.by_name["b"].num_other_requests = 3
    assert choose(replicas, entry()) == "b"
    assert choose(replicas, entry(), {"b"}) == "a"
    assert replicas.may_leave(entry(), replicas.by_name["a"])
    running_entry = entry("v1")
    assert not replicas.may_leave(running_entry, replicas.by_name["a"])
    assert choose(replicas, running_entry) == "a"


def test_the_named_weights_are_those_of_a_new_request() -> None:
    assert replica_set().weight_version == ""
    handles = [replica("a", "v1", is_swapping=True), replica("b", "v2"), replica("c", "v3")]
    for handle, load in zip(handles, (0, 4, 3), strict=True):
        handle.num_other_requests = load
    assert replica_set(*handles).weight_version == "v3"


def test_a_removed_replica_has_no_cache() -> None:
    """Another one may get its name."""
    replicas, prompt = replica_set(replica("a"), replica("b")), list(range(BLOCK_SIZE))
    replicas.router.record("a", prompt)
    assert replicas.router.choose(prompt, {"a": 1, "b": 0}) == "a"
    replicas.remove(replicas.by_name["a"])
    assert list(replicas.by_name) == ["b"]
    assert replicas.router.choose(prompt, {"a": 1, "b": 0}) == "b"


def test_load_and_use_by_hand() -> None:
    one = replica("a")
    one.in_flight = {"x": entry(), "y": entry()}
    one.num_other_requests = 3
    assert one.load == 5
    usable = [
        (one.is_ready, one.is_listed, one.is_draining)
        for one.is_ready, one.is_listed, one.is_draining in itertools.product(
            (True, False), repeat=3
        )
        if one.is_usable
    ]
    assert usable == [(True, True, False)]
    swapping, other = replica("s", is_swapping=True), replica("b")
    running_entry = entry()
    running_entry.tokens = [1]
    assert replica_set(swapping, other).may_leave(entry(), swapping)
    assert not replica_set(swapping, other).may_leave(running_entry, swapping)
    assert not replica_set(swapping).may_leave(entry(), swapping)
    assert not replica_set(swapping, other).may_leave(entry(), other)


def test_an_answer_stays_with_its_weights() -> None:
    replicas = replica_set(replica("a", "v1"), replica("b", "v2"))
    replicas.by_name["b"].num_other_requests = 9
    assert choose(replicas, entry("v2")) == "b"
    with pytest.raises(EngineFull):
        choose(replicas, entry("v2"), {"b"})
    with pytest.raises(WeightsReplacedError, match=r"began with v0, .* but v1, v2"):
        choose(replicas, entry("v0"))


def test_it_waits_for_capacity_or_says_at_once_that_there_is_none() -> None:
    replicas = replica_set(replica("a"), replica("b"))
    full = {"a", "b"}
    replicas.by_name["a"].queue_wait_s, replicas.by_name["b"].queue_wait_s = 7.5, 4.5
    with pytest.raises(EngineFull) as refusal:
        choose(replicas, entry(), full, seconds=60)
    assert refusal.value.retry_after_s == 4.5
    assert choose(replicas, entry(), full, seconds=60, wait_for_capacity=True) in ("a", "b")
    assert full == set()


def test_it_waits_for_a_replica_until_the_deadline() -> None:
    replicas = replica_set()
    with pytest.raises(UnavailableError):
        choose(replicas, entry(), seconds=0.01)
    assert replicas.list_now.is_set()

    async def run() -> str:
        replicas = replica_set()
        waiting = asyncio.ensure_future(
            replicas.choose(entry(), set(), time.monotonic() + 60, False)
        )
        await asyncio.sleep(0)
        replicas.by_name["c"] = replica("c")
        await replicas.notify_ready()
        return (await waiting).name

    assert asyncio.run(run()) == "c"
