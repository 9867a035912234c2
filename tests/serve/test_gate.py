"""What a flood of requests does before any of them is parsed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from typing import Any

import pytest

from nanochat_ray.engine.request import EngineFull, Request
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.client import OutputStream
from nanochat_ray.serve.gate import (
    FLOOD_S,
    MAX_STARTS,
    MAX_UNDECIDED,
    MAX_WAIT_S,
    REFUSAL_S,
    STARTS_PER_S,
    TOO_MANY,
    AdmissionGate,
)
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.asgi import call, http
from tests.serve.scripted import ScriptedClient

FULL = EngineFull("max_queue_s=2: a request would wait 3.5 s", 3.5)


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def is_refused(gate: AdmissionGate, client: str = "") -> bool:
    return gate.refusal(client) is not None


def test_a_refusal_counts_for_a_while_and_one_client() -> None:
    clock = Clock()
    gate = AdmissionGate(clock)

    def state() -> tuple[bool, bool]:
        return is_refused(gate, "a"), is_refused(gate, "b")

    assert state() == (False, False)
    gate.record("a", 0, FULL)
    assert state() == (True, False)
    clock.now += REFUSAL_S / 2
    gate.record("b", 0, FULL)
    assert state() == (True, True)
    clock.now += REFUSAL_S / 2
    assert state() == (False, True)
    gate.record("b", 0, FULL)
    clock.now += REFUSAL_S / 2
    assert state() == (False, True)  # from the latest one on


@pytest.mark.parametrize(("iteration_s", "seconds"), [(0.01, 0.1), (0.25, 0.5), (4.0, 1.0)])
def test_a_slow_loop_refuses_for_longer(iteration_s: float, seconds: float) -> None:
    clock = Clock()
    gate = AdmissionGate(clock)

    async def run() -> None:
        for _ in range(2):
            await gate.enter("")
            clock.now += iteration_s
            await asyncio.sleep(0)
        gate.record("", 0, FULL)
        clock.now += 0.9 * seconds
        assert is_refused(gate)
        clock.now += 0.2 * seconds
        assert not is_refused(gate)

    asyncio.run(run())


def test_a_less_urgent_request_tells_nothing() -> None:
    gate = AdmissionGate()
    gate.record("", 1, FULL)
    assert not is_refused(gate)


async def starts(
    gate: AdmissionGate, clients: list[str], clock: Clock | None = None, seconds: float = 0.0
) -> list[str]:
    """What becomes of requests that come at once, in the order in which they begin, with a mark at
    the end of each iteration of the event loop, which takes so many ``seconds``."""
    events: list[str] = []

    async def request(number: int, client: str) -> None:
        try:
            await gate.enter(client)
        except EngineFull:
            events.append(f"refused {number}")
        else:
            events.append(str(number))

    tasks = [asyncio.ensure_future(request(i, client)) for i, client in enumerate(clients)]
    while not all(task.done() for task in tasks):
        if clock is not None:
            clock.now += seconds
        await asyncio.sleep(0)
        events.append("|")
    return events


def sizes(events: list[str]) -> list[int]:
    """How many requests an iteration decided, without the iterations that decided none."""
    groups = [group.strip(",") for group in ",".join(events).split("|")]
    return [len(group.split(",")) for group in groups if group]


def test_in_a_flood_the_others_do_not_wait() -> None:
    """But those of a client whose requests the engines take do."""
    clock = Clock()
    gate = AdmissionGate(clock)
    gate.record("a", 0, FULL)
    clock.now += REFUSAL_S
    few = [str(i) for i in range(MAX_STARTS)]
    first = asyncio.run(starts(gate, ["a"] * (MAX_STARTS + 2) + ["b"]))
    late = [f"refused {MAX_STARTS}", f"refused {MAX_STARTS + 1}"]
    assert [e for e in first if e != "|"] == [*few, *late, str(MAX_STARTS + 2)]
    assert sizes(first) == [MAX_STARTS + 3]
    clock.now += FLOOD_S
    events = asyncio.run(starts(gate, ["a"] * (MAX_STARTS + 2)))
    assert [e for e in events if e != "|"] == [*few, str(MAX_STARTS), str(MAX_STARTS + 1)]


def test_in_a_flood_few_are_undecided() -> None:
    clock = Clock()
    gate = AdmissionGate(clock)
    gate.record("a", 0, FULL)
    clock.now += REFUSAL_S
    with contextlib.ExitStack() as stack:
        for _ in range(MAX_UNDECIDED):
            assert not is_refused(gate, "a")
            stack.enter_context(gate.submission("a"))
        assert is_refused(gate, "a")
        assert not is_refused(gate, "b")
    assert not is_refused(gate, "a")


@pytest.mark.parametrize("is_due", [False, True])
def test_refusals_here_prolong_a_flood_once_while_a_reply_is_due(is_due: bool) -> None:
    """Otherwise bursts that come as ``Retry-After`` says would be refused by an idle engine."""
    clock = Clock()
    gate = AdmissionGate(clock)

    async def burst() -> bool:
        """Whether the gate refuses some."""
        events = await starts(gate, [""] * (4 * MAX_STARTS))
        await asyncio.sleep(0)  # the event loop is idle before the next one
        await asyncio.sleep(0)
        return any("refused" in event for event in events)

    async def run() -> list[bool]:
        gate.record("", 0, FULL)
        refusals = []
        for _ in range(4):
            clock.now += 0.9 * FLOOD_S
            with gate.submission("") if is_due else contextlib.nullcontext():
                refusals.append(await burst())
        return refusals

    assert asyncio.run(run()) == [True, is_due, False, False]


def test_clients_share_the_gate() -> None:
    """A client that always waits keeps no other out: one in a flood of its own, and a new one."""
    clock = Clock()
    gate = AdmissionGate(clock)
    gate.record("flood", 0, FULL)
    clock.now += REFUSAL_S
    counts: Counter[str] = Counter()

    async def enter(client: str) -> None:
        with contextlib.suppress(EngineFull):
            await gate.enter(client)
            counts[client] += 1

    async def run() -> None:
        tasks = [asyncio.ensure_future(enter("busy")) for _ in range(40 * MAX_STARTS)]
        for _ in range(20):
            await asyncio.sleep(0)
            for client in ("flood", "new"):
                await enter(client)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    assert counts["flood"] == counts["new"] == 20
    assert counts["busy"] > 20


def test_many_clients_take_turns() -> None:
    gate, count = AdmissionGate(), 4 * MAX_STARTS
    clients = [str(i) for i in range(count)]
    events = asyncio.run(starts(gate, clients * 3))
    # At first as many begin of clients that do not wait as later have their turns.
    assert sizes(events) == [2 * MAX_STARTS, *[MAX_STARTS] * 10]
    order = [int(event) % count for event in events if event != "|"]
    for first in range(0, 2 * count, count):
        assert len(set(order[first : first + count])) == count


def test_a_client_that_has_left_is_not_counted() -> None:
    gate = AdmissionGate()

    async def run() -> None:
        tasks = [asyncio.ensure_future(gate.enter("")) for _ in range(2 * MAX_STARTS)]
        await asyncio.sleep(0)
        assert len(gate._clients[""].turns) == MAX_STARTS
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert not gate._clients[""].turns

    asyncio.run(run())


def test_the_engines_decide_on_what_is_submitted() -> None:
    counts = []

    class Engine(ScriptedClient):
        async def submit(self, request: Request, stream: OutputStream) -> None:
            counts.append(app.state.refusals._gate._clients[""].num_undecided)
            await super().submit(request, stream)

    engine = Engine([65])
    app = build_app(engine, Tokenizer.bytes_only(), "m", 256)
    assert post(app)[0] == 200
    engine.refuse = FULL
    assert post(app)[0] == 429
    counts.append(app.state.refusals._gate._clients[""].num_undecided)
    assert counts == [1, 1, 0]


def test_as_many_begin_in_a_flood_of_long_iterations() -> None:
    clock = Clock()
    gate = AdmissionGate(clock)
    gate.record("", 0, FULL)
    clock.now += REFUSAL_S

    async def run() -> list[int]:
        """Of 60 that come in each iteration of 0.25 s, those that may begin."""
        counts = []
        for _ in range(3):
            counts.append(0)
            for _ in range(60):
                if gate.refusal("") is None:
                    assert gate.begin_in_flood("")
                    counts[-1] += 1
            clock.now += 0.25
            await asyncio.sleep(0)
        return counts

    assert asyncio.run(run()) == [MAX_STARTS, 50, 50]


def test_few_requests_begin_at_once_in_order() -> None:
    count = 2 * MAX_STARTS + 3
    events = asyncio.run(starts(AdmissionGate(), [""] * count))
    assert [e for e in events if e != "|"] == [str(i) for i in range(count)]
    assert sizes(events) == [MAX_STARTS, MAX_STARTS, 3]


def test_more_begin_after_a_long_iteration() -> None:
    clock = Clock()
    gate = AdmissionGate(clock)
    # 200 a second: 50 in 0.25 s.
    events = asyncio.run(starts(gate, [""] * (MAX_STARTS + 120), clock, 0.25))
    assert sizes(events) == [MAX_STARTS, 50, 50, 20]
    clock.now += 60.0
    assert sizes(asyncio.run(starts(gate, [""] * 20))) == [MAX_STARTS, MAX_STARTS, 4]


def test_what_would_wait_too_long_is_refused_at_once() -> None:
    """At the pace of the last iteration: 8 in 1/32 s are 128 in ``MAX_WAIT_S``."""
    clock = Clock()
    gate = AdmissionGate(clock)
    count = int(MAX_WAIT_S * 32 * MAX_STARTS)

    async def run() -> list[asyncio.Task[None]]:
        await gate.enter("")
        clock.now += 1 / 32
        tasks = [asyncio.ensure_future(gate.enter("")) for _ in range(MAX_STARTS + count + 3)]
        await asyncio.sleep(0)
        late = [task for task in tasks if task.done() and task.exception()]
        for task in tasks:
            task.cancel()
        return late

    late = asyncio.run(run())
    assert len(late) == 2  # one more waits than are counts in that time
    assert all(str(task.exception()) == str(TOO_MANY) for task in late)


def test_a_request_that_waits_too_long_is_refused() -> None:
    clock = Clock()
    iteration_s = 0.75 * MAX_WAIT_S
    count = MAX_STARTS + int(STARTS_PER_S * iteration_s) + 3
    events = asyncio.run(starts(AdmissionGate(clock), [""] * count, clock, iteration_s))
    assert sizes(events) == [MAX_STARTS, count - MAX_STARTS - 3, 3]
    assert [e for e in events if "refused" in e] == [f"refused {i}" for i in range(count)[-3:]]


def test_a_refusal_ends_the_wait_of_its_client_alone() -> None:
    count = 3 * MAX_STARTS

    async def run() -> list[str]:
        gate = AdmissionGate()
        task = asyncio.ensure_future(starts(gate, ["a"] * count + ["b"]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the first ones have counts
        gate.record("a", 0, FULL)
        return await task

    iterations = asyncio.run(run())
    events = [event for event in iterations if event != "|"]
    assert events[:MAX_STARTS] == [str(i) for i in range(MAX_STARTS)]
    rest = [*(f"refused {i}" for i in range(MAX_STARTS, count)), str(count)]
    assert sorted(events[MAX_STARTS:]) == sorted(rest)
    # All at once, not in turns.
    assert max(sizes(iterations)) >= count - MAX_STARTS


def test_a_client_that_leaves_keeps_nobody_waiting() -> None:
    async def run() -> None:
        gate = AdmissionGate()
        tasks = [asyncio.ensure_future(gate.enter("")) for _ in range(MAX_STARTS + 2)]
        await asyncio.sleep(0)
        tasks[MAX_STARTS].cancel()
        await asyncio.wait_for(tasks[MAX_STARTS + 1], 10)

    asyncio.run(run())


def post(app: Any, path: str = "/v1/completions", body: bytes | None = None, **fields: Any) -> Any:
    """Status, Retry-After and error of a request."""
    body = json.dumps({"prompt": "x", **fields}).encode() if body is None else body
    start, *rest = call(app, http(path, content_type="application/json"), body)
    headers = dict(start["headers"])
    error = json.loads(b"".join(message["body"] for message in rest)).get("error")
    return start["status"], headers.get(b"retry-after"), error


def test_the_next_request_is_refused_unparsed() -> None:
    engine = ScriptedClient([65])
    app = build_app(engine, Tokenizer.bytes_only(), "m", 256)
    engine.refuse = FULL
    by_engine = post(app)
    assert by_engine[:2] == (429, b"4")
    assert by_engine[2]["code"] == "queue_full"
    engine.refuse = None
    assert post(app) == by_engine
    assert post(app, "/v1/chat/completions", b"no JSON") == by_engine
    assert post(app, "/v1/responses", b"{}") == by_engine
    assert engine.requests == []
    assert post(app, "/tokenize")[0] == 200  # it needs no engine
    refusals = call(app, http("/metrics", "GET"))[1]["body"].decode()
    assert 'nanochat_request_refusals_total{model_name="m",status="429"} 4.0' in refusals


@pytest.mark.parametrize("fields", [{"n": 2}, {"priority": 1}])
def test_what_says_nothing_of_other_requests(fields: dict[str, Any]) -> None:
    engine = ScriptedClient([65])
    app = build_app(engine, Tokenizer.bytes_only(), "m", 256)
    engine.refuse = FULL
    assert post(app, **fields)[0] == 429
    engine.refuse = None
    assert post(app)[0] == 200
