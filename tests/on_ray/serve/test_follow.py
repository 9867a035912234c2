"""Two replicas follow their run, without Serve: only its handles are doubles."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checkpoint.follow import ServedCheckpoint
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
            await until(lambda: answers)
            for seed in (1, 2, 3):
                await asyncio.to_thread(write_checkpoint, tiny_run, seed)
                name = f"step-{100 + seed:06d}"
                await until(lambda name=name: all(r.checkpoint == name for r in replicas))
            has_ended.set()
            await asyncio.gather(*clients)
            answers.append(await generate(client, "last"))
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


class Answers:
    """The handle of a deployment whose replicas answer each call with the next of these lists."""

    def __init__(self, *answers: Any):
        self.answers, self.calls = list(answers), list[tuple[Any, ...]]()

    def broadcast(self, *call: Any) -> Answers:
        self.calls.append(call)
        return self

    async def results_async(self, *, timeout_s: float, return_exceptions: bool) -> list[Any]:
        self.calls.append((timeout_s, return_exceptions))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]


def served_checkpoint(name: str) -> ServedCheckpoint:
    fields: dict[str, Any] = {"model": None, "tokenizer": "", "val_metric": None}
    return ServedCheckpoint(name=name, version=f"version of {name}", **fields)


def follower_of(handle: Any, root: Store) -> LocalFollower:
    return LocalFollower(handle, root.uri, "tiny", "m", drain_s=30)


def task_error(error: Exception) -> RayTaskError:
    return RayTaskError("swap", "a trace", error)


@pytest.mark.parametrize(
    ("answers", "error", "message"),
    [
        ([None, ""], None, ""),
        ([None, None], None, ""),  # it is gone; its successor is swapped later
        ([None, ActorDiedError()], None, ""),
        ([None, "another tokenizer"], ValueError, "^another tokenizer$"),
        ([task_error(KeyError("x")), None], ValueError, "^engine replica a failed: 'x'$"),
        (
            [task_error(OSError("no bucket"))],
            OSError,
            "^engine replica a cannot read it: no bucket",
        ),
        ([OSError("no bucket")], OSError, "cannot read it"),
        ([task_error(PermissionError("not yours"))], ValueError, "failed: not yours"),
        ([PermissionError("not yours")], ValueError, "failed: not yours"),
        (TimeoutError("late"), RuntimeError, "^engine replica a does not answer: late$"),
    ],
)
def test_the_answer_of_one_replica_decides(
    root: Store, answers: Any, error: type[Exception] | None, message: str
) -> None:
    handle = Answers(answers)
    work = follower_of(handle, root)._swap("a", served_checkpoint("step-000007"))
    if error is None:
        asyncio.run(work)
    else:
        with pytest.raises(error, match=message):
            asyncio.run(work)
    # Loading takes up to two minutes beside the 30 s in which requests finish.
    assert handle.calls == [("swap", "a", "step-000007"), (150, True)]


def test_only_other_weights_are_swapped(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = served_checkpoint("step-000001"), served_checkpoint("step-000002")
    endpoints = [
        {"replica": name, "weight_version": version}
        for name, version in (("a", old.version), ("b", new.version), ("c", ""))
    ]
    handle = Answers(endpoints, [""], [""], endpoints, ["it is damaged"], endpoints, [""], [""])
    deployment = follower_of(handle, root)
    monkeypatch.setattr(deployment, "_wait", asyncio.run)
    deployment._swap_all(new)
    swaps = [call[1:] for call in handle.calls if call[0] == "swap"]
    assert swaps == [("a", new.name), ("c", new.name)]
    # A replica that refuses the new checkpoint: all return to the old one.
    handle.calls.clear()
    follower: Any = SimpleNamespace(watcher=SimpleNamespace(current=old))
    deployment.follower = follower
    roll: Any = SimpleNamespace(about=new)
    with pytest.raises(ValueError, match="it is damaged"):
        deployment._roll(roll)
    swaps = [call[1:] for call in handle.calls if call[0] == "swap"]
    assert swaps == [("a", new.name), ("b", old.name), ("c", old.name)]
    assert asyncio.run(follower_of(handle, root).status()) == {}
    handle.answers = [TimeoutError("late")]
    with pytest.raises(RuntimeError, match="the engine replicas cannot be listed: late"):
        asyncio.run(deployment._versions())
