"""The engine's thread: every request ends exactly once, whatever happens."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from nanochat_ray.engine import loop as loop_module
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.request import EngineFull, Request, RequestOutput
from tests.engine.engine_kit import answer, ask, make_engine, make_model
from tests.waiting import wait_for


class Collector:
    """Outputs by request, and a way to wait for them."""

    def __init__(self) -> None:
        self.results: dict[str, list[RequestOutput]] = {}
        self.steps = 0
        self._condition = threading.Condition()

    def __call__(self, outputs: list[RequestOutput]) -> None:
        with self._condition:
            self.steps += 1
            for output in outputs:
                self.results.setdefault(output.request_id, []).append(output)
            self._condition.notify_all()

    def wait(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        with self._condition:
            assert self._condition.wait_for(condition, timeout=seconds), self.results

    @contextlib.contextmanager
    def pause_when(self, condition: Callable[[], bool], seconds: float = 60) -> Iterator[None]:
        """Once the condition holds, the engine waits with its next output for the block to end."""
        with self._condition:
            assert self._condition.wait_for(condition, timeout=seconds), self.results
            yield

    def ends(self, name: str) -> list[str]:
        return [o.finish for o in self.results.get(name, []) if o.finish]

    def tokens(self, name: str) -> list[int]:
        return [t for o in self.results[name] for t in o.tokens]


@pytest.fixture
def loop() -> Iterator[tuple[EngineLoop, Collector]]:
    collector = Collector()
    engine_loop = EngineLoop(make_engine(make_model("modern")), collector)
    engine_loop.start()
    yield engine_loop, collector
    engine_loop.stop()


def test_many_threads_submit_and_abort(loop: tuple[EngineLoop, Collector]) -> None:
    engine, out = loop
    want = answer(make_engine(make_model("modern")), ask("r", [1, 2, 3], max_tokens=12))

    def client(n: int) -> None:
        for i in range(4):
            engine.submit(ask(f"{n}-{i}", [1, 2, 3], max_tokens=12))
            if i == 2:
                engine.abort(f"{n}-{i}")

    threads = [threading.Thread(target=client, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    names = [f"{n}-{i}" for n in range(6) for i in range(4)]
    out.wait(lambda: all(out.ends(name) for name in names))
    for name in names:
        (end,) = out.ends(name)
        if end == "length":
            assert out.tokens(name) == want
        else:
            assert (end, name[-1]) == ("abort", "2")
    engine.stop()
    engine._engine.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_cache_usage) == (0, 0, 0.0)
    assert stats.generated_tokens >= 12 * 18
    assert stats.steps > 0
    assert stats.step_seconds > 0


def test_rejections_come_at_once(loop: tuple[EngineLoop, Collector]) -> None:
    engine, out = loop
    with pytest.raises(ValueError, match="128 tokens"):
        engine.submit(ask("long", [1] * 128))
    with out.pause_when(lambda: True):  # the first is not complete when the second comes
        engine.submit(ask("r", [1], max_tokens=100))
        with pytest.raises(ValueError, match="'r'"):
            engine.submit(ask("r", [1]))
    engine.abort("nobody")


def test_an_engine_without_a_step_does_not_hang() -> None:
    assert not EngineLoop(make_engine(make_model("modern")), lambda outputs: None).is_hung(0.0)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_the_thread_has_less_priority() -> None:
    here = os.getpriority(os.PRIO_PROCESS, 0)
    steps: list[int] = []

    def on_step(_: list[RequestOutput]) -> None:
        steps.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    loop = EngineLoop(make_engine(make_model("modern")), on_step, niceness=1)
    loop.start()
    try:
        loop.submit(ask("a", [1, 2], max_tokens=1))
        wait_for(lambda: steps, 60, "a step")
    finally:
        loop.stop()
    assert steps[0] == min(19, here + 1)
    assert os.getpriority(os.PRIO_PROCESS, 0) == here


def test_full_queue_is_rejected() -> None:
    engine = make_engine(make_model("modern"), max_num_seqs=1, max_queue_size=1)
    loop = EngineLoop(engine, lambda outputs: None)  # not started: nothing leaves the queue
    loop.submit(ask("a", [1]))
    loop.submit(ask("b", [1]))
    with pytest.raises(EngineFull, match="max_queue_size=1"):
        loop.submit(ask("c", [1]))


def test_arrivals_count_until_they_are_added() -> None:
    engine = make_engine(make_model("modern"), max_num_seqs=1, max_queue_size=1)
    loop = EngineLoop(engine, lambda outputs: None)
    for name in ("a", "b"):
        loop.submit(ask(name, [1]))
    inbox = loop._take_inbox()
    loop._num_arriving = len(inbox)  # as the thread sets it
    with pytest.raises(EngineFull, match="max_queue_size=1"):
        loop.submit(ask("c", [1]))
    assert loop._apply(inbox, []) == []
    assert loop._num_arriving == 0
    with pytest.raises(EngineFull, match="max_queue_size=1"):
        loop.submit(ask("c", [1]))


def test_waits_are_compared_with_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the submission to the first token, for requests that had to wait."""
    engine = make_engine(make_model("modern"))
    loop = EngineLoop(engine, lambda outputs: None)
    times, waits = iter((100.0, 103.5)), iter((5.0, 0.0))
    records: list[tuple[float, float]] = []
    monkeypatch.setattr(loop_module.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(engine.queue_time, "wait_s", lambda *_: next(waits))
    monkeypatch.setattr(engine.queue_time, "first_token_s", lambda request, wait_s: 2 + wait_s)
    monkeypatch.setattr(engine.queue_time, "record_wait", lambda *args: records.append(args))
    for name in ("waits", "runs"):
        loop.submit(ask(name, [1]))
        for tokens in ([], [1], [2]):
            loop._deliver([RequestOutput(request_id=name, tokens=tokens)])
    assert records == [(7.0, 3.5)]


def test_full_queue_compiles_no_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(make_model("modern"), max_num_seqs=1, max_queue_size=1)
    loop = EngineLoop(engine, lambda outputs: None)
    calls: list[str] = []
    monkeypatch.setattr(engine, "prepare", lambda request: calls.append(request.id))
    for name in ("a", "b"):
        loop.prepare(ask(name, [1], grammar={"regex": "a"}))
        loop.submit(ask(name, [1]))
    with pytest.raises(EngineFull, match="max_queue_size=1"):
        loop.prepare(ask("c", [1], grammar={"regex": "a"}))
    assert calls == ["a", "b"]


def test_stop_lets_requests_finish_or_aborts_them() -> None:
    for deadline, end in ((100.0, "length"), (0.0, "abort")):
        out = Collector()
        loop = EngineLoop(make_engine(make_model("modern")), out)
        loop.start()
        with out.pause_when(lambda: True):
            for i in range(6):
                loop.submit(ask(f"r{i}", [1, 2], max_tokens=100))
            start = time.monotonic()
            stopping = threading.Thread(target=loop.stop, args=(deadline,))
            stopping.start()
            if not deadline:  # the requests are not complete when the time is up
                wait_for(lambda loop=loop: loop._dropping)
        stopping.join()
        assert not deadline or time.monotonic() - start < deadline
        assert [out.ends(f"r{i}") for i in range(6)] == [[end]] * 6
        with pytest.raises(RuntimeError, match="stopping"):
            loop.submit(ask("late", [1]))


def test_loop_survives_failed_steps(
    loop: tuple[EngineLoop, Collector],
) -> None:
    """Any number of them, but fewer than three in a row."""
    engine, out = loop
    run, fail = engine._engine.runner.run, [True] * 2

    def broken(chunks, previous_ids):  # type: ignore[no-untyped-def]
        if fail:
            fail.pop()
            raise MemoryError("no memory for this step")
        return run(chunks, previous_ids)

    engine._engine.runner.run = broken  # type: ignore[method-assign]
    ends: list[str] = []
    for name in "abcdef":
        engine.submit(ask(name, [1, 2]))
        out.wait(lambda name=name: bool(out.ends(name)))  # type: ignore[misc]
        ends += out.ends(name)
        if ends[-1] == "length":
            fail += [True] * 2
    assert ends == ["error", "error", "length"] * 2
    assert "no memory" in str(out.results["a"][-1].error)
    assert engine.failure is None


def test_a_request_that_cannot_be_added_ends_alone(
    loop: tuple[EngineLoop, Collector], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, out = loop
    add = engine._engine.add

    def broken(request: Request) -> None:
        if request.id == "bad":
            raise ZeroDivisionError("of the grammar")
        add(request)

    monkeypatch.setattr(engine._engine, "add", broken)
    for name in ("bad", "good"):
        engine.submit(ask(name, [1, 2]))
    out.wait(lambda: bool(out.ends("bad") and out.ends("good")))
    assert (out.ends("bad"), out.ends("good")) == (["error"], ["length"])
    assert out.results["bad"][-1].error == "ZeroDivisionError: of the grammar"
    assert engine._num_arriving == 0


def test_loop_that_keeps_failing_reports_it() -> None:
    out = Collector()
    loop = EngineLoop(make_engine(make_model("modern")), out)

    def broken(chunks, previous_ids):  # type: ignore[no-untyped-def]
        raise RuntimeError("device lost")

    loop._engine.runner.run = broken  # type: ignore[method-assign]
    loop.start()
    for i in range(3):
        loop.submit(ask(f"r{i}", [1]))
        out.wait(lambda name=f"r{i}": out.ends(name) == ["error"])  # type: ignore[misc]
    wait_for(lambda: loop.failure is not None, 60, "the loop's end")
    assert "device lost" in str(loop.failure)
    with pytest.raises(RuntimeError, match="dead"):
        loop.submit(ask("late", [1]))
    loop.stop()
