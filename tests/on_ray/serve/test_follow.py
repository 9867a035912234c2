"""Two replicas follow their run, without Serve: only its handles are doubles."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.config import to_json
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.loading import engine_from_run
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.on_ray.serve.client import RayEngineClient
from nanochat_ray.on_ray.serve.follow import FollowDeployment
from nanochat_ray.on_ray.serve.replica import EngineReplica
from nanochat_ray.serve.client import OutputStream
from nanochat_ray.storage import Store
from tests.engine.engine_kit import answer
from tests.on_ray.serve.tiny_run import LocalReplica, write_checkpoint

ENGINE = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64, max_queue_size=64)
PARAMS = SamplingParams(max_tokens=60, temperature=0.0)
PROMPT = list(range(65, 105))


class Broadcast:
    """The handle of a deployment with these replicas, and a call of all of them."""

    def __init__(self, replicas: Sequence[LocalReplica], method: str = "", *args: Any):
        self.replicas, self.method, self.args = replicas, method, args

    def broadcast(self, method: str, *args: Any) -> Broadcast:
        return Broadcast(self.replicas, method, *args)

    async def results_async(self, **_: Any) -> list[Any]:
        calls = [getattr(replica, self.method)(*self.args) for replica in self.replicas]
        return await asyncio.gather(*calls, return_exceptions=True)


class LocalFollower(FollowDeployment):
    """Without Serve nothing awaits ``__del__``."""

    def __del__(self) -> None:  # type: ignore[override]
        pass


@pytest.fixture
def tiny_run(root: Store) -> Store:
    write_checkpoint(root, 0)
    return root


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def endpoint(
    root: Store,
) -> AsyncIterator[tuple[list[LocalReplica], RayEngineClient, LocalFollower]]:
    """Two replicas, an ingress's client and the follower."""
    replicas = [
        LocalReplica(
            root.uri, "tiny", to_json(ENGINE), "cpu", 1, name=name, model="m", host="127.0.0.1"
        )
        for name in ("a", "b")
    ]
    for replica in replicas:
        await replica.reconfigure({"follow": "latest"})
    handle: Any = Broadcast(replicas)
    deployment = LocalFollower(handle, root.uri, "tiny", "m", drain_s=30)
    await deployment.reconfigure({"target": "latest", "margin": 0.1})
    client = RayEngineClient(handle)
    client.start()
    await until(lambda: sum(r.is_usable for r in client.replicas.by_name.values()) == 2)
    yield replicas, client, deployment
    await client.close()
    await FollowDeployment.__del__(deployment)
    for replica in replicas:
        await EngineReplica.__del__(replica)


async def generate(client: RayEngineClient, id: str) -> tuple[str, list[int]]:
    """Weights and tokens of one answer."""
    stream, tokens, version = OutputStream(), [], ""
    await client.submit(Request(id=id, prompt=PROMPT, params=PARAMS), stream)
    async for outputs in stream:
        for output in outputs:
            assert output.finish in (None, "length"), output
            tokens += output.tokens
            version = version or output.weight_version
    return version, tokens


def reference(root: Store, name: str) -> list[int]:
    engine, _ = engine_from_run(root.child("runs", "tiny"), ENGINE, name)
    return answer(engine, Request(id="r", prompt=PROMPT, params=PARAMS))


@pytest.mark.slow
def test_answers_outlive_three_rolls(tiny_run: Store) -> None:
    """Twelve clients, more than one replica has slots for."""

    async def run() -> list[tuple[str, list[int]]]:
        answers: list[tuple[str, list[int]]] = []
        has_ended = asyncio.Event()

        async def ask(number: int) -> None:
            while not has_ended.is_set():
                answers.append(await generate(client, f"{number}-{len(answers)}"))

        async with endpoint(tiny_run) as (replicas, client, _):
            clients = [asyncio.ensure_future(ask(number)) for number in range(12)]
            for seed in (1, 2, 3):
                await asyncio.to_thread(write_checkpoint, tiny_run, seed)
                name = f"step-{100 + seed:06d}"
                await until(lambda name=name: all(r.checkpoint == name for r in replicas))
            has_ended.set()
            await asyncio.gather(*clients)
        return answers

    answers = asyncio.run(run())
    store = tiny_run.child("runs", "tiny")
    names = [f"step-{100 + seed:06d}" for seed in range(4)]
    tokens = {checkpoint.weight_version(store, n): reference(tiny_run, n) for n in names}
    assert len(set(map(tuple, tokens.values()))) == 4
    assert all(output == tokens[version] for version, output in answers)
    assert len({version for version, _ in answers}) > 1


def test_a_replica_that_restarts_is_swapped(tiny_run: Store) -> None:
    """It loaded another checkpoint than the endpoint serves."""
    write_checkpoint(tiny_run, 1)

    async def run() -> None:
        async with endpoint(tiny_run) as (replicas, _, _):
            await until(lambda: all(r.checkpoint == "step-000101" for r in replicas))
            await replicas[0].swap("a", "step-000100")
            await until(lambda: replicas[0].checkpoint == "step-000101")

    asyncio.run(run())


def test_an_outage_in_a_replica_is_no_swap(
    tiny_run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its read failed: the roll goes on when it succeeds, and nothing is refused."""
    swap, failures = LocalReplica.swap, [OSError("the bucket cannot be reached")]

    async def failing_swap(replica: LocalReplica, name: str, target: str) -> str | None:
        if replica.name == name == "b" and failures:
            raise failures.pop()
        return await swap(replica, name, target)

    monkeypatch.setattr(LocalReplica, "swap", failing_swap)

    async def run() -> None:
        async with endpoint(tiny_run) as (replicas, _, deployment):
            await asyncio.to_thread(write_checkpoint, tiny_run, 1)
            await until(lambda: deployment.follower.status()["num_swaps"])
            assert [r.checkpoint for r in replicas] == ["step-000101"] * 2
            assert not failures
            assert deployment.follower.status()["num_refusals"] == 0

    asyncio.run(run())


def test_damaged_weights_are_refused_by_name(tiny_run: Store, tmp_path: Path) -> None:
    write_checkpoint(Store.at(str(tmp_path)), 1)
    folder = tmp_path / "runs/tiny/step-000101"
    (folder / "weights.msgpack").write_bytes(b"")

    async def run() -> None:
        async with endpoint(tiny_run) as (replicas, _, deployment):
            # In one motion: before it was damaged it was sound, and would have been served.
            folder.rename(Path(tiny_run.root) / "runs/tiny/step-000101")
            await until(lambda: deployment.follower.status()["refused"])
            refusal = deployment.follower.status()["refused"]["step-000101"]
            assert "weights.msgpack is damaged" in refusal
            assert [r.checkpoint for r in replicas] == ["step-000100"] * 2

    asyncio.run(run())


@pytest.mark.parametrize(
    ("error", "refusal"),
    [
        (PermissionError("forbidden"), "b failed: forbidden"),
        (RayTaskError("swap", "Traceback …", KeyError("wte")), "b failed: 'wte'"),
    ],
)
def test_a_checkpoint_that_one_cannot_load_is_refused(
    tiny_run: Store, monkeypatch: pytest.MonkeyPatch, error: Exception, refusal: str
) -> None:
    """The other replica returns to the old one."""
    swap = LocalReplica.swap

    async def failing_swap(replica: LocalReplica, name: str, target: str) -> str | None:
        if replica.name == name == "b" and target == "step-000101":
            raise error
        return await swap(replica, name, target)

    monkeypatch.setattr(LocalReplica, "swap", failing_swap)

    async def run() -> None:
        async with endpoint(tiny_run) as (replicas, _, deployment):
            await asyncio.to_thread(write_checkpoint, tiny_run, 1)
            await until(lambda: deployment.follower.status()["num_refusals"])
            assert refusal in deployment.follower.status()["refused"]["step-000101"]
            assert [r.checkpoint for r in replicas] == ["step-000100"] * 2

    asyncio.run(run())


@pytest.mark.slow
def test_a_hung_engine_counts_as_lost(tiny_run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its event loop answers, but its thread makes no step: the other one continues."""

    async def run() -> None:
        async with endpoint(tiny_run) as (replicas, client, _):
            hanging = replicas[0]
            monkeypatch.setattr(type(hanging), "is_hung", property(lambda r: r is hanging))
            await until(lambda: list(client.replicas.by_name) == ["b"])
            with pytest.raises(RuntimeError, match="hangs"):
                await hanging.check_health()
            assert (await hanging.endpoint())["address"] is None
            version, tokens = await generate(client, "r")
            assert (version[:11], len(tokens)) == ("step-000100", 60)

    asyncio.run(run())
