"""A guest of an engine that serves samples what an engine of its own would; no Ray."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kvcache.slot_manager import SlotManager
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.offline import LocalEngine
from nanochat_ray.engine.request import EngineStoppedError, SamplingParams
from nanochat_ray.evals.answers import make_requests
from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray import fleet_engine
from nanochat_ray.on_ray.fleet_engine import EngineSpec, GuestEngine
from nanochat_ray.storage import Store
from tests.rl.tiny_rl import ENGINE, POLICY, save_parent
from tests.tiny import TOKENIZER, tiny_config

SPEC = EngineSpec(owner="", model=POLICY, tokenizer_run="", config=ENGINE)


def spec_of(root: Store) -> EngineSpec:
    return dataclasses.replace(SPEC, tokenizer_run=root.child("runs", "chat").uri)


def in_order(wires: list[Any]) -> list[Any]:
    return sorted(wires, key=lambda wire: int(wire["id"].partition("/")[2]))


def host() -> EngineLoop:
    model = GPT(tiny_config(n_layer=1))
    model.init_weights(torch.Generator().manual_seed(0))
    loop = EngineLoop(Engine.from_model(model, TOKENIZER, ENGINE), lambda outputs: None)
    loop.start()
    return loop


def test_guest_samples_with_the_weights_of_a_call(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_engine.ray, "get", lambda arrays: arrays)
    save_parent(root)
    model, _ = checkpoint.load_model(root.child("runs", "chat"))
    spec = spec_of(root)
    local = LocalEngine.from_model(model, TOKENIZER, ENGINE)
    requests = make_requests([1, 2], range(12), SamplingParams(max_tokens=9, logprobs=0), "r")
    wires = [request.to_wire() for request in requests]

    async def run() -> None:
        loop, guest = host(), GuestEngine("cpu")
        version_of_host = loop.weight_version

        async def sample(version: int) -> list[Any]:
            arrays = {name: t.numpy().copy() for name, t in model.state_dict().items()}
            return in_order(await guest.run(loop, spec, version, [arrays], wires))

        for version in (3, 4):
            local.load(version, model.state_dict())
            reference = in_order([output.to_wire() for output in local.run(requests)])
            assert await sample(version) == reference
            assert {output["weight_version"] for output in reference} == {str(version)}
            for weight in model.state_dict().values():
                weight.mul_(1.1)
        assert loop.weight_version == version_of_host
        loop.stop()
        with pytest.raises(EngineStoppedError):
            await sample(5)
        guest.leave()
        assert not guest.is_here

    asyncio.run(run())


def test_a_guest_has_run_in_all_slots(root: Store) -> None:
    save_parent(root)
    guest = spec_of(root).make("cpu")
    manager = guest.engine.runner.kv_manager
    assert isinstance(manager, SlotManager)
    assert all(manager._pages.committed_bytes(slot) for slot in range(ENGINE.max_num_seqs))
    stats = guest.engine.stats()
    assert (stats.num_finished, stats.generated_tokens) == (8, 16)
    assert (guest.version, guest.engine.has_work) == (-1, False)


class Host:
    """Its jobs end when the test says so."""

    def __init__(self) -> None:
        self.jobs: list[Future[list[Any]]] = []

    def run_in_background(self, steps: Any) -> Future[list[Any]]:
        self.jobs.append(Future())
        return self.jobs[-1]


class Calls:
    """Calls of a guest, and what they make and read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.guest = GuestEngine("cpu")
        self.engines: list[Any] = []
        self.reads: list[Any] = []
        monkeypatch.setattr(EngineSpec, "make", self._make)
        monkeypatch.setattr(fleet_engine, "read_weights", self.reads.append)

    def _make(self, *_: Any) -> Any:
        engine = SimpleNamespace(version=-1, steps=lambda *_: None)
        self.engines.append(engine)
        return engine

    def start(self, host: Any, owner: str, version: int = 1) -> asyncio.Task[list[Any]]:
        spec = dataclasses.replace(SPEC, owner=owner)
        weights: Any = f"of {version}"
        return asyncio.ensure_future(self.guest.run(host, spec, version, weights, []))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("other", ["host", "run"])
def test_a_new_owner_waits_for_calls_that_run(monkeypatch: pytest.MonkeyPatch, other: str) -> None:
    """One guest is never stepped by two threads, and two are never in memory."""

    async def run() -> None:
        calls, hosts = Calls(monkeypatch), (Host(), Host())
        first = calls.start(hosts[0], "a")
        await until(lambda: hosts[0].jobs)
        host, name = (hosts[1], "a") if other == "host" else (hosts[0], "b")
        second = calls.start(host, name)
        # It is cancelled, but its job runs: a thread cannot be interrupted in a step.
        hosts[0].jobs[0].set_running_or_notify_cancel()
        first.cancel()
        await asyncio.wait([first])
        assert first.cancelled()
        await asyncio.sleep(0.01)
        assert len(calls.engines) == 1
        hosts[0].jobs[0].set_result([])
        await until(lambda: len(hosts[0].jobs + hosts[1].jobs) == 2)
        assert len(calls.engines) == 2
        host.jobs[-1].set_result([])
        assert await second == []

    asyncio.run(run())


def test_weights_are_read_if_they_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        calls, host = Calls(monkeypatch), Host()
        first = calls.start(host, "a", 1)
        await until(lambda: host.jobs)
        host.jobs[0].set_result([])
        await first
        (engine,) = calls.engines
        engine.version = 1
        # The job of version 2 has not begun. When the last 1 follows it, its weights are needed.
        others = [calls.start(host, "a", version) for version in (1, 2, 1)]
        await until(lambda: len(host.jobs) == 4)
        assert calls.reads == ["of 1", "of 2", "of 1"]
        for result in host.jobs[1:]:
            result.set_result([])
        await asyncio.gather(*others)

    asyncio.run(run())


def test_a_guest_leaves_after_its_last_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_engine, "IDLE_S", 0.0)

    async def run() -> None:
        calls, host = Calls(monkeypatch), Host()
        tasks = [calls.start(host, "a"), calls.start(host, "a")]
        await until(lambda: len(host.jobs) == 2)
        host.jobs[0].set_result([])
        await tasks[0]
        await asyncio.sleep(0.01)  # however long the other takes
        assert calls.guest.is_here
        host.jobs[1].set_result([])
        await until(lambda: not calls.guest.is_here)
        # Another call gets another engine.
        last = calls.start(host, "a")
        await until(lambda: len(host.jobs) == 3)
        host.jobs[2].set_result([])
        await asyncio.gather(last, tasks[1])
        assert len(calls.engines) == 2

    asyncio.run(run())
