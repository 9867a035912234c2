"""How long a request would wait, from hand-made measurements."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest

from nanochat_ray.engine import engine as engine_module
from nanochat_ray.engine import queue_limit as limit_module
from nanochat_ray.engine import scheduler as scheduler_module
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.queue_time import MAX_CORRECTION, QueueTime
from nanochat_ray.engine.request import EngineFull, Request, RequestOutput, SamplingParams
from nanochat_ray.engine.sequence import Sequence
from tests.engine.engine_kit import make_engine, make_model
from tests.waiting import wait_for


def request(name: str = "new", max_tokens: int = 10, **fields: object) -> Request:
    params = SamplingParams(max_tokens=max_tokens)
    return Request(id=name, prompt=[1] * 4, params=params, **fields)  # type: ignore[arg-type]


def sequence(num_outputs: int = 0, max_tokens: int = 10, **fields: object) -> Sequence:
    """One whose prompt is computed if it has outputs."""
    r = request("s", max_tokens, **fields)
    return Sequence(
        r,
        [1] * (4 + num_outputs),
        seed=0,
        max_length=4 + max_tokens,
        prefill_spans=[(0, 4)],
        num_computed_tokens=4 + num_outputs - 1 if num_outputs else 0,
    )


def queue_of(num_slots: int = 2) -> QueueTime:
    """Steps of 0.5 s, prompt chunks of 3 tokens, answers of 10."""
    queue_time = QueueTime(num_slots)
    queue_time.record_step(0.5, num_slots, [3])
    queue_time.record_output(10)
    return queue_time


def test_no_wait_while_a_slot_is_free() -> None:
    assert queue_of().wait_s(request(), [sequence(1)], []) == 0
    assert QueueTime(1).wait_s(request(), [sequence(1)], [sequence()]) == 0  # nothing measured


def test_a_slot_is_free_when_the_first_answer_ends() -> None:
    running = [sequence(num_outputs=2), sequence(num_outputs=7)]
    assert queue_of().wait_s(request(), running, []) == 0.5 * 3


def test_waiting_requests_take_slots_first() -> None:
    # Slots are free after 8 and 3 steps. A waiting request takes 3 / 3 of a chunk and 10 tokens:
    # the first until 3 + 11 = 14, the second until 8 + 11 = 19.
    running, queue = [sequence(num_outputs=2), sequence(num_outputs=7)], queue_of()
    assert queue.wait_s(request(), running, [sequence()]) == 0.5 * 8
    assert queue.wait_s(request(), running, [sequence(), sequence()]) == 0.5 * 14
    # One that is no sequence yet has 4 prompt tokens to compute, not 3: 10 + 4 / 3 steps.
    assert queue.wait_s(request(), running, [], [request()] * 2) == pytest.approx(
        0.5 * (3 + 10 + 4 / 3)
    )


def test_answers_end_at_the_usual_length_or_their_limit() -> None:
    queue = queue_of(num_slots=1)
    assert queue.wait_s(request(), [sequence(3, max_tokens=50)], []) == 0.5 * 7
    assert queue.wait_s(request(), [sequence(3, max_tokens=5)], []) == 0.5 * 2
    assert queue.wait_s(request(), [sequence(30, max_tokens=50)], []) == 0.5 * 1


def test_priority_and_other_clients_go_first_fairly() -> None:
    queue, running = queue_of(num_slots=1), [sequence(9)]
    waiting = [sequence(client="a") for _ in range(5)]
    one = 11  # steps
    assert queue.wait_s(request(client="a"), running, waiting) == 0.5 * (1 + 5 * one)
    # A client without requests goes behind one of each other client.
    assert queue.wait_s(request(client="b"), running, waiting) == 0.5 * (1 + 1 * one)
    waiting.append(sequence(client="b"))
    assert queue.wait_s(request(client="b"), running, waiting) == 0.5 * (1 + 3 * one)
    assert queue.wait_s(request(client="a", priority=-1), running, waiting) == 0.5
    waiting.append(sequence(client="c", priority=-1))
    assert queue.wait_s(request(client="d"), running, waiting) == 0.5 * (1 + 3 * one)


def test_full_batches_replace_the_first_measurements() -> None:
    queue = QueueTime(num_slots=4)
    queue.record_output(10)
    queue.record_step(0.1, 1, [])
    running = [sequence(9) for _ in range(4)]
    assert queue.wait_s(request(), running, []) == 0.1
    queue.record_step(0.4, 3, [])
    assert queue.wait_s(request(), running, []) == 0.4


@pytest.mark.parametrize(("num_steps", "weight"), [(1, 1 / 2), (16, 1 / 16)])
def test_one_slow_step_is_no_trend(num_steps: int, weight: float) -> None:
    queue = QueueTime(num_slots=1)
    for _ in range(num_steps):
        queue.record_step(0.1, 1, [])
    queue.record_step(60.0, 1, [])
    # As if it had taken 4 times the mean.
    assert queue.full_step_s.value == pytest.approx(0.1 + (0.4 - 0.1) * weight)


def test_a_queue_that_is_too_slow_is_refused() -> None:
    engine = make_engine(make_model("modern"), max_num_seqs=1, max_queue_s=2.5)
    loop = EngineLoop(engine, lambda outputs: None)  # not started: nothing leaves the queue
    engine.queue_time.record_step(0.5, 1, [4])
    engine.queue_time.record_output(4)
    # Each takes 1 step for its prompt and 4 for its answer: the second waits 2.5 s.
    for name in ("a", "b"):
        loop.submit(request(name, max_tokens=4))
    with pytest.raises(EngineFull, match=r"max_queue_s=2.5: a request would wait 5.0 s") as refusal:
        loop.submit(request("c", max_tokens=4))
    assert refusal.value.retry_after_s == 5.0
    assert loop.stats().waiting == 2
    # Its client reads the answer already.
    loop.submit(request("moved", max_tokens=4, output_token_ids=(1, 2)))
    off = make_engine(make_model("modern"), max_num_seqs=1, max_queue_s=0.0)
    off.queue_time = engine.queue_time
    loop = EngineLoop(off, lambda outputs: None)
    for name in ("a", "b", "c", "d"):
        loop.submit(request(name, max_tokens=4))


def test_a_full_queue_says_when_to_retry() -> None:
    engine = make_engine(make_model("modern"), max_num_seqs=1, max_queue_size=1, max_queue_s=0.0)
    loop = EngineLoop(engine, lambda outputs: None)
    engine.queue_time.record_step(2.0, 1, [4])
    engine.queue_time.record_output(4)
    loop.submit(request("a", max_tokens=4))
    loop.submit(request("b", max_tokens=4))
    with pytest.raises(EngineFull, match="max_queue_size=1") as refusal:
        loop.submit(request("c", max_tokens=4))
    assert refusal.value.retry_after_s == 20.0


def test_a_request_with_output_enters_a_full_queue() -> None:
    engine = make_engine(make_model("modern"), max_num_seqs=1, max_queue_size=1)
    for name in ("a", "b"):
        engine.add(request(name))
    engine.add(request("moved", output_token_ids=(1,)))
    with pytest.raises(EngineFull):
        engine.add(request("new"))


def test_estimates_follow_the_measured_waits() -> None:
    queue, running = queue_of(num_slots=1), [sequence(9)]
    assert queue.wait_s(request(), running, []) == 0.5
    for _ in range(16):
        queue.record_wait(2.0, 3.0)
    assert queue.wait_s(request(), running, []) == pytest.approx(0.5 * 1.5)
    # What is measured again is not corrected: the wait, 4 / 3 steps of the prompt, and its token.
    first_token_s = queue.first_token_s(request(), 0.5 * 1.5)
    assert first_token_s == pytest.approx(0.5 + 0.5 * (4 / 3 + 1))
    for _ in range(100):
        queue.record_wait(1.0, 100.0)
    assert queue.wait_s(request(), running, []) == 0.5 * MAX_CORRECTION
    assert queue.waits_s.window == queue.estimates_s.window  # or they are of other requests
    assert (queue.num_waits, queue.total_wait_s) == (116, 16 * 3.0 + 100 * 100.0)


def test_a_loop_measures_waits() -> None:
    engine = make_engine(make_model("modern"), max_num_seqs=1)
    engine.queue_time.record_step(0.5, 1, [4])
    engine.queue_time.record_output(4)
    ends: list[str] = []
    loop = EngineLoop(
        engine, lambda outputs: ends.extend(o.request_id for o in outputs if o.finish)
    )
    for name in ("a", "b", "c"):
        loop.submit(request(name, max_tokens=4))
    loop.submit(request("moved", max_tokens=4, output_token_ids=(1, 2)))
    loop.start()
    wait_for(lambda: len(ends) == 4)
    loop.stop()
    # The first one did not wait, and the last is no new one. The others were expected to: 5 and 10
    # steps and their prompts.
    assert engine.queue_time.estimates_s.count == 2
    assert engine.queue_time.waits_s.value > 0


@pytest.mark.parametrize("max_queue_s", [2.0, 0.0])
def test_a_request_that_has_waited_too_long_is_refused(
    monkeypatch: pytest.MonkeyPatch, max_queue_s: float
) -> None:
    engine = make_engine(make_model("modern"), max_num_seqs=1, max_queue_s=max_queue_s)
    engine.queue_time.record_step(1.0, 1, [4])
    engine.queue_time.record_output(1)
    outputs: list[RequestOutput] = []
    loop = EngineLoop(engine, outputs.extend)
    now = [100.0]
    clock = SimpleNamespace(**{**vars(time), "monotonic": lambda: now[0]})
    for module in (engine_module, limit_module, scheduler_module):
        monkeypatch.setattr(module, "time", clock)

    def step(*submissions: Request) -> dict[str, str | None]:
        """Reason and error of the requests that end in a step of the loop."""
        outputs.clear()
        for submission in submissions:
            loop.submit(submission)
        loop._deliver(
            loop._apply(loop._take_inbox(), []) + loop._limit.refuse_late() + engine.step()
        )
        return {o.request_id: o.error or o.finish for o in outputs if o.finish}

    version = engine.weight_version
    assert step(request("runs", max_tokens=40)) == {}
    assert step(request("late"), request("one-of-two", weight_version=version)) == {}
    now[0] += 2.0
    assert step(request("later", max_tokens=1)) == {}
    estimate_s = engine.queue_time.estimates_s.value
    now[0] += 0.25
    late = dict.fromkeys(("late", "one-of-two"), "max_queue_s=2: it has waited for 2.2 s")
    assert step() == (late if max_queue_s else {})
    # What was waited for counts in the next estimates.
    assert (engine.queue_time.estimates_s.value > estimate_s) == bool(max_queue_s)
    assert engine.queue_time.num_waits == 0
    ends: dict[str, str | None] = {}
    while len(ends) < (2 if max_queue_s else 4):
        ends |= step()
    assert set(ends.values()) == {"length"}
    assert {"runs", "later"} <= set(ends)


def test_the_end_of_a_queue_that_has_become_slower_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(make_model("modern"), max_num_seqs=1, max_queue_s=10.0)
    engine.queue_time.record_step(0.5, 1, [4])
    engine.queue_time.record_output(4)
    loop, now = EngineLoop(engine, lambda outputs: None), [100.0]
    clock = SimpleNamespace(**{**vars(time), "monotonic": lambda: now[0]})
    for module in (engine_module, limit_module, scheduler_module):
        monkeypatch.setattr(module, "time", clock)

    def refusals(seconds: float, step_s: float) -> dict[str, str]:
        now[0] += seconds
        engine.queue_time.full_step_s.value = step_s
        return {o.request_id: o.error or "" for o in loop._limit.refuse_late()}

    # Each takes 5 steps, so that they wait for 0, 5, 10, 15 and 20 of them.
    for name in ("a", "b", "c", "d", "e"):
        loop.submit(request(name, max_tokens=4))
    loop.submit(request("moved", max_tokens=4, output_token_ids=(1,)))
    loop._apply(loop._take_inbox(), [])
    assert refusals(0.0, 0.65) == {}  # 13 s, 1.3 times the limit
    assert refusals(0.05, 0.8) == {}  # estimated ten times a second
    assert list(refusals(0.05, 0.8)) == ["e"]
    # 2 s have passed.
    assert refusals(1.9, 0.8) == {"d": "max_queue_s=10: by now it would wait for longer"}
    # Slots are shared between clients: this one waits for 5 steps.
    loop.submit(request("other", max_tokens=4, client="other"))
    loop._apply(loop._take_inbox(), [])
    assert refusals(1.0, 2.0) == {}
    assert {s.request.id for s in engine.scheduler.waiting} == {"a", "b", "c", "moved", "other"}


def test_max_queue_s_is_checked() -> None:
    with pytest.raises(ValueError, match="max_queue_s=-1"):
        EngineConfig(max_queue_s=-1.0)


def test_an_engine_measures_itself() -> None:
    engine = make_engine(make_model("modern"), max_num_seqs=2)
    for name in ("a", "b"):
        engine.add(request(name, max_tokens=6))
    while engine.has_work:
        engine.step()
    queue = engine.queue_time
    assert queue.output_tokens.value == 6
    assert queue.chunk_tokens.value == 4
    assert queue.full_step_s.value > 0
