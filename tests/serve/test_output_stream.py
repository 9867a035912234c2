"""A reader's stream: which outputs it yields, when it ends, and what it aborts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from nanochat_ray.engine.request import Finish, Request, RequestOutput, SamplingParams
from nanochat_ray.serve.client import OutputStream, UnavailableError
from nanochat_ray.serve.local import LocalClient
from tests.engine.engine_kit import make_engine, make_model


def output(name: str, finish: Finish | None = None) -> RequestOutput:
    return RequestOutput(request_id=name, finish=finish)


def read(*steps: Callable[[OutputStream], None], names: str = "ab") -> tuple[list[str], list[str]]:
    """Each list of outputs, as the names in it, and the requests that were aborted. The steps
    happen one after the other while the reader waits."""
    batches: list[str] = []
    aborted_ids: list[str] = []
    stream = OutputStream()
    for name in names:
        stream.take(name, lambda name=name: aborted_ids.append(name))  # type: ignore[misc]

    async def act() -> None:
        for step in steps:
            for _ in range(3):
                await asyncio.sleep(0)
            step(stream)

    async def run() -> None:
        actor = asyncio.ensure_future(act())
        async with asyncio.timeout(60):
            async for outputs in stream:
                batches.append("".join(each.request_id for each in outputs))
        await actor

    asyncio.run(run())
    return batches, aborted_ids


def test_it_ends_with_the_last_request() -> None:
    def three(stream: OutputStream) -> None:
        for each in (output("a"), output("b"), output("a", "stop")):
            stream.push(each)

    batches, aborted_ids = read(three, lambda s: s.push(output("b", "length")))
    assert batches == ["aba", "b"]
    assert aborted_ids == []  # close after the end aborts nothing


def test_aborted_requests_are_complete() -> None:
    def end(stream: OutputStream) -> None:
        stream.push(output("b", "stop"))
        stream.close()
        stream.close()

    assert read(lambda s: s.abort("a"), lambda s: s.abort("a"), end) == (["b"], ["a"])
    both = read(lambda s: s.push(output("a")), lambda s: (s.close(), s.push(output("a")))[1])
    assert both == (["a", "a"], ["a", "b"])
    assert read(lambda s: s.drop("a"), lambda s: s.push(output("b", "stop"))) == (["b"], [])
    assert read(names="") == ([], [])


def test_an_error_comes_behind_the_outputs_before_it() -> None:
    """The first of several; other requests can still be aborted."""
    stream, batches, aborted_ids = OutputStream(), [], []
    for name in "ab":
        stream.take(name, lambda name=name: aborted_ids.append(name))  # type: ignore[misc]
    stream.push(output("a"))
    stream.fail("a", UnavailableError("first"))
    stream.fail("a", UnavailableError("second"))

    async def run() -> None:
        async for outputs in stream:
            batches.append(len(outputs))

    with pytest.raises(UnavailableError, match=r"^first$"):
        asyncio.run(run())
    stream.close()
    assert (batches, aborted_ids) == ([1], ["b"])


def test_an_engine_that_stops_is_unavailable() -> None:
    client = LocalClient(make_engine(make_model("classic")))
    client.close()
    request = Request(id="a", prompt=[1], params=SamplingParams())
    with pytest.raises(UnavailableError, match="the engine is stopping"):
        asyncio.run(client.submit(request, OutputStream()))


def test_a_refusal_leaves_nothing_behind() -> None:
    client, stream = LocalClient(make_engine(make_model("classic"))), OutputStream()
    request = Request(id="a", prompt=[1] * 200, params=SamplingParams())

    async def run() -> list[list[RequestOutput]]:
        with pytest.raises(ValueError, match="prompt has 200 tokens"):
            await client.submit(request, stream)
        async with asyncio.timeout(60):
            return [outputs async for outputs in stream]

    try:
        assert asyncio.run(run()) == []
        assert client._streams == {}
    finally:
        client.close()
