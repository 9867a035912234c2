"""Background jobs: requests come first, and jobs change none of their tokens."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator

import pytest

from nanochat_ray.engine import step_clock
from nanochat_ray.engine.background import Background
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.offline import run_steps
from nanochat_ray.engine.request import EngineStoppedError, RequestOutput
from nanochat_ray.engine.scheduler import Scheduler
from tests.engine.engine_kit import answer, ask, make_engine, make_model
from tests.engine.test_loop import Collector
from tests.waiting import wait_for


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def steps_of(clock: Clock, seconds: float, count: int) -> Generator[int, None, None]:
    for number in range(count):
        clock.now += seconds
        yield number


def one_request(*, decodes: bool) -> Scheduler:
    """With a request that has its first token, or whose prompt waits."""
    engine = make_engine(make_model("modern"))
    engine.add(ask("r", [1, 2, 3], max_tokens=8))
    if decodes:
        engine.step()
    return engine.scheduler


def idle() -> Scheduler:
    return make_engine(make_model("modern")).scheduler


def test_jobs_run_in_order_while_idle() -> None:
    clock = Clock()
    background = Background(0.25, clock)
    results = [background.submit(steps_of(clock, 1.0, count)) for count in (2, 1)]
    for _ in range(5):
        background.take_turn(idle())
    assert [r.result(0) for r in results] == [[0, 1], [0]]
    assert not background.has_jobs
    assert clock.now == 3.0


def test_no_turn_while_a_prompt_waits() -> None:
    background = Background(0.9, Clock())
    background.submit(steps_of(Clock(), 1.0, 1))
    background.take_turn(one_request(decodes=False))
    assert background.has_jobs


def test_share_of_time_beside_decodes() -> None:
    clock, scheduler = Clock(), one_request(decodes=True)
    clock.now = 10.0
    background = Background(0.25, clock)
    turns = []
    background.submit(steps_of(clock, 2.0, 9))
    for _ in range(16):  # a decode takes 1 s
        before = clock.now
        background.take_turn(scheduler)
        turns.append(clock.now > before)
        clock.now += 1.0
    # A step of 2 s, then 6 s of decodes.
    assert [i for i, has_run in enumerate(turns) if has_run] == [0, 6, 12]


def test_share_zero_waits_for_idle_time() -> None:
    clock = Clock()
    background = Background(0.0, clock)
    result = background.submit(steps_of(clock, 1.0, 1))
    clock.now = 100.0
    background.take_turn(one_request(decodes=True))
    assert clock.now == 100.0
    for _ in range(2):
        background.take_turn(idle())
    assert result.result(0) == [0]


def test_failed_job_leaves_the_others() -> None:
    def fails() -> Generator[int, None, None]:
        yield 0
        raise ValueError("a bad step")

    background = Background(0.25, Clock())
    first, second, last = (
        background.submit(steps) for steps in (fails(), fails(), steps_of(Clock(), 1.0, 1))
    )
    assert second.cancel()
    for _ in range(5):
        background.take_turn(idle())
    with pytest.raises(ValueError, match="a bad step"):
        first.result(0)
    assert last.result(0) == [0]


def test_a_job_that_cannot_be_closed_ends_alone() -> None:
    def stubborn() -> Generator[int, None, None]:
        try:
            yield 1
        finally:
            raise ValueError("no end")

    background = Background(0.25, Clock())
    jobs = [background.submit(stubborn()) for _ in range(2)]
    background.take_turn(idle())
    background.end(EngineStoppedError("over"))
    for job in jobs:
        with pytest.raises(EngineStoppedError, match="over"):
            job.result(0)


def test_long_jobs_do_not_excuse_hung_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(step_clock.time, "monotonic", lambda: now[0])
    engine_loop = EngineLoop(make_engine(make_model("modern")), print)
    engine_loop._job_clock.begin()
    now[0] = 60.0
    assert not engine_loop.is_hung(10)  # it may compile
    engine_loop._job_clock.end(0)
    engine_loop._clock.begin()
    engine_loop._clock.end(0)
    engine_loop._clock.begin()
    now[0] = 71.0
    assert engine_loop.is_hung(10)


@pytest.fixture
def loop() -> Iterator[tuple[EngineLoop, Collector]]:
    collector = Collector()
    engine_loop = EngineLoop(make_engine(make_model("modern"), background_share=0.5), collector)
    engine_loop.start()
    yield engine_loop, collector
    engine_loop.stop()


def outputs_of(steps: list[list[RequestOutput]], name: str) -> list[int]:
    return [t for step in steps for o in step if o.request_id == name for t in o.tokens]


def test_jobs_and_requests_keep_their_tokens(loop: tuple[EngineLoop, Collector]) -> None:
    engine_loop, collector = loop
    classic, requests = (
        make_model("classic"),
        [ask(f"b{i}", [i, 4], max_tokens=9) for i in range(6)],
    )
    reference = [answer(make_engine(classic), request) for request in requests]
    users = [ask(f"u{i}", [1, 2, 3, i], max_tokens=30) for i in range(6)]
    user_reference = [answer(make_engine(make_model("modern")), user) for user in users]
    other = make_engine(classic)
    jobs = [engine_loop.run_in_background(run_steps(other, requests[i : i + 3])) for i in (0, 3)]
    for user in users:
        engine_loop.submit(user)
    collector.wait(lambda: all(collector.ends(user.id) for user in users))
    steps = jobs[0].result(60) + jobs[1].result(60)
    assert [outputs_of(steps, request.id) for request in requests] == reference
    assert [collector.tokens(user.id) for user in users] == user_reference


def test_an_arrival_waits_for_no_job() -> None:
    events: list[str] = []

    def job() -> Generator[int, None, None]:
        while True:
            events.append("job")
            yield 0

    def on_step(outputs: list[RequestOutput]) -> None:
        events.extend(output.request_id for output in outputs)
        if events.count("first") == 1 and "second" not in events:
            engine_loop.submit(ask("second", [1, 2], max_tokens=2))

    engine_loop = EngineLoop(
        make_engine(make_model("modern"), background_share=0.9), on_step=on_step
    )
    engine_loop.submit(ask("first", [1, 2], max_tokens=30))
    engine_loop.run_in_background(job())
    engine_loop.start()
    wait_for(lambda: "second" in events)
    engine_loop.stop()
    first = events.index("first")
    assert "job" not in events[first : events.index("second")]


def test_stopped_loop_ends_its_jobs() -> None:
    engine_loop, has_begun = EngineLoop(make_engine(make_model("modern")), print), threading.Event()
    other = make_engine(make_model("classic"))

    def endless() -> Generator[list[RequestOutput], None, None]:
        while True:
            for step in run_steps(other, [ask("r", [1], max_tokens=9)]):
                has_begun.set()
                yield step

    engine_loop.start()
    jobs = [engine_loop.run_in_background(endless()) for _ in range(2)]
    assert has_begun.wait(60)
    engine_loop.stop()
    for job in jobs:
        with pytest.raises(EngineStoppedError):
            job.result(60)
    assert not other.has_work
    with pytest.raises(EngineStoppedError, match="stopping"):
        engine_loop.run_in_background(endless())
