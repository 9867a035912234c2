"""Asynchronous scheduling: a step is planned while the previous one is in flight, as on a GPU.

On a CPU a step is done when it is launched, so these tests check the order of events: nothing is
used that the host could not know yet. test_same_tokens checks the tokens too.
"""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nanochat_ray.engine.cuda_graphs import StepResult
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.in_flight import ForwardOutput, InFlightStep, sample
from nanochat_ray.engine.request import Request, RequestOutput
from nanochat_ray.engine.runner import Runner
from nanochat_ray.engine.sampling_state import SamplingState
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.sequence import Sequence
from nanochat_ray.text.tools import Tool
from tests.engine.engine_kit import VOCAB, ask, finish, make_engine, make_model, tokens


def make(overlap: str = "on", **settings: Any) -> Engine:
    return make_engine(
        make_model("modern"), async_scheduling=overlap, num_speculative_tokens=0, **settings
    )


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(2, 12))] for _ in range(count)]


def answers(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    for request in requests:
        engine.add(request)
    return {name: tokens(outputs) for name, outputs in finish(engine).items()}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What engines do: "run", with the number of placeholder tokens, and "read"."""
    log: list[str] = []
    run, wait = Runner.run, InFlightStep.wait

    def spy_run(
        runner: Runner, chunks: list[ScheduledChunk], previous_ids: torch.Tensor | None
    ) -> StepResult:
        placeholders = [c for c in chunks if c.input_from_previous_step is not None]
        assert all(c.start == len(c.sequence.tokens) for c in placeholders)
        assert all(c.end <= len(c.sequence.tokens) for c in chunks if c not in placeholders)
        log.append(f"run {len(placeholders)}")
        return run(runner, chunks, previous_ids)

    def spy_wait(step: InFlightStep) -> Any:
        log.append("read")
        return wait(step)

    monkeypatch.setattr(Runner, "run", spy_run)
    monkeypatch.setattr(InFlightStep, "wait", spy_wait)
    return log


def test_step_runs_before_previous_is_read(events: list[str]) -> None:
    requests = [ask(str(i), [i + 1, i + 2], max_tokens=4) for i in range(3)]
    actual = answers(make(), requests)
    assert events == ["run 0", "run 3", "read", "run 3", "read", "run 3", "read", "read"]
    assert actual == answers(make("off"), requests)


def test_discarded_rows_leave_others_unchanged() -> None:
    """Stop tokens, and requests that abort, expire or are preempted with a token in flight."""
    plain = [
        ask(str(i), p, max_tokens=30, temperature=1.0, seed=i, frequency_penalty=0.5)
        for i, p in enumerate(prompts(24))
    ]
    whole = answers(make("off"), plain)
    rng, engine, results = random.Random(1), make(), dict[str, list[RequestOutput]]()
    stops = {name: output_ids[rng.randrange(len(output_ids))] for name, output_ids in whole.items()}
    coming = [
        ask(
            r.id,
            list(r.prompt),
            max_tokens=30,
            temperature=1.0,
            seed=int(r.id),
            frequency_penalty=0.5,
            stop_ids=[stops[r.id]] if int(r.id) % 2 else [],
            deadline=time.monotonic() + 3600,
        )
        for r in plain
    ]
    cut, num_discarded = set[str](), 0
    while coming or engine.has_work:
        if coming and rng.random() < 0.5:
            engine.add(coming.pop(0))
        for output in engine.step():
            results.setdefault(output.request_id, []).append(output)
        if (step := engine._in_flight) is not None:
            num_discarded += sum(not c.sequence.num_placeholders for c in step.chunks)
        running = [s for s in engine.scheduler.running if s.request.id not in cut]
        if running and rng.random() < 0.3:
            engine.preempt(rng.choice(running).request.id)
        elif running and rng.random() < 0.2 and len(cut) < 6:
            victim = rng.choice(running)
            cut.add(victim.request.id)
            if len(cut) % 2:
                engine.abort(victim.request.id)
            else:
                object.__setattr__(victim.request, "deadline", -1.0)
        engine.check_integrity()
    assert num_discarded > 5
    assert len(cut) == 6
    for name, output_ids in whole.items():
        actual = tokens(results[name])
        if name in cut:
            assert actual == output_ids[: len(actual)]
            assert results[name][-1].finish in ("abort", "error")
        else:
            end = output_ids.index(stops[name]) + 1 if int(name) % 2 else len(output_ids)
            assert actual == output_ids[:end]


def test_tool_output_replaces_in_flight_token() -> None:
    tool = Tool(10, 20, 30, 31, lambda ids: ids[::-1])
    results: list[tuple[dict[str, list[int]], set[tuple[str, int]]]] = []
    for overlap in ("off", "on"):
        engine = make_engine(
            make_model("modern"), tool, async_scheduling=overlap, num_speculative_tokens=0
        )
        run, prefill_positions = engine.runner.run, set[tuple[str, int]]()

        def spy(chunks: list[ScheduledChunk], previous_ids: torch.Tensor | None) -> StepResult:
            for c in chunks:
                if not c.is_decode:
                    positions = range(c.start, c.end)
                    prefill_positions.update((c.sequence.request.id, i) for i in positions)  # noqa: B023
            return run(chunks, previous_ids)  # noqa: B023

        engine.runner.run = spy  # type: ignore[method-assign]
        bias = {10: 7.0, 20: 7.0}
        params: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "logit_bias": bias}
        texts = enumerate(prompts(12, seed=2))
        output_ids = answers(engine, [ask(str(i), p, seed=i, **params) for i, p in texts])
        results.append((output_ids, prefill_positions))
    assert sum(30 in output_ids for output_ids in results[0][0].values()) > 5
    # Its output and the token before it are computed as prompts, also if that had run as a decode.
    assert results[0] == results[1]


def test_step_with_draft_is_committed_at_once() -> None:
    """Also where prompts beside it leave no rows for more."""
    results = []
    for overlap in ("off", "on"):
        engine = make_engine(
            make_model("modern"),
            async_scheduling=overlap,
            speculative_disable_by_batch_size=3,
            prompt_lookup_max=1,
        )
        engine.add(ask("a", [1, 2], max_tokens=40, repetition_penalty=0.3))
        outputs: dict[str, list[RequestOutput]] = {}
        for i in range(60):
            if i in (15, 20, 25):
                for k in range(3):
                    engine.add(ask(f"{i}{k}", [i, k], max_tokens=2))
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
        assert engine.stats().num_accepted_tokens > 5
        results.append({name: tokens(output_ids) for name, output_ids in outputs.items()})
    assert results[0] == results[1]


def test_reset_drops_the_step_in_flight() -> None:
    engine, request = make(), ask("a", [1, 2, 3], max_tokens=9)
    want = answers(make("off"), [request])
    engine.add(request)
    for _ in range(3):
        engine.step()
    assert engine._in_flight is not None
    assert engine.reset() == ["a"]
    assert answers(engine, [request]) == want


@pytest.mark.parametrize("count", [1, 2])
def test_small_batches_are_async_without_drafts(count: int) -> None:
    """Also where a step has room for draft tokens; it waits only where a draft is expected."""
    engine = make_engine(make_model("modern"), async_scheduling="on", prompt_lookup_max=2)
    for i in range(count):
        engine.add(ask(str(i), [i + 1], max_tokens=12))
    waits, repeats = [], []
    while engine.has_work:
        engine.step()
        waits.append(engine._in_flight is None)
        repeats.append(any(s.propose_draft(1) for s in engine.scheduler.running))
    assert not any(waits[:3])
    engine.add(ask("r", [5, 6, 7, 5, 6], max_tokens=4))
    engine.step()
    assert engine._in_flight is None, "the prompt repeats itself"


class NoWaiting(TorchDispatchMode):
    """Refuses what makes a host wait for a GPU: to assign a number to a place, and to assign
    through an index, which may check it. (Tensors without values refuse to be read.)"""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = str(func)
        assert "index_put" not in name
        assert name != "aten.copy_.default" or any(args[1].stride()), "a number is assigned"
        return func(*args, **(kwargs or {}))


def test_sampling_on_a_gpu_never_waits() -> None:
    """On tensors without values."""
    device = torch.device("meta")
    state, chunks = SamplingState(4, VOCAB, device), []
    for slot, params in enumerate(
        (
            {"temperature": 1.0, "top_p": 0.9, "min_p": 0.1, "logprobs": 3},
            {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "logit_bias": {3: 1.0}},
            {"repetition_penalty": 1.2, "frequency_penalty": 0.5},
            {"min_tokens": 3, "stop_ids": [4], "temperature": 1.0},
        )
    ):
        request = ask(str(slot), [1, 2], **params)
        s = Sequence(request, [1, 2], 7, 99, prefill_spans=[(0, 2)], slot=slot)
        s.stop_token_ids, s.num_computed_tokens = request.params.all_stop_ids, 2
        with NoWaiting():
            state.admit(s)
        s.num_placeholders, s.placeholder_row = 1, slot
        chunks.append((slot, ScheduledChunk.of(s, 1, is_decode=True)))
    before = torch.zeros(4, dtype=torch.int64, device=device)
    logits = torch.zeros((4, VOCAB), device=device)
    with NoWaiting():
        step = sample(ForwardOutput(logits, chunks), state, None, before)
        state.count([2, 3], [5, 6])
    assert step.token_ids.shape == (4,)
    assert step.token_ids.device == device


def test_step_without_samples_is_waited_for(events: list[str]) -> None:
    """Or a long prompt's chunks would all be queued before anybody else's."""
    prompt, results = list(range(40)), []
    for overlap in ("on", "off"):
        engine = make(overlap, prefill_chunk=8, max_num_batched_tokens=8)
        engine.add(ask("a", prompt, max_tokens=2, prompt_logprobs=1))
        results.append(finish(engine)["a"][0].prompt_logprobs)
    assert events[:12] == ["run 0", *["run 0", "read"] * 4, "run 1", "read", "read"]
    assert len(results[0] or ()) == len(prompt) - 1
    assert results[0] == results[1]


def test_finished_in_flight_request_does_not_expire() -> None:
    engine = make()
    engine.add(ask("a", [1, 2], max_tokens=2, deadline=time.monotonic() + 3600))
    engine.step()
    engine.step()
    object.__setattr__(engine.scheduler.running[0].request, "deadline", time.monotonic())
    assert [(len(o.tokens), o.finish) for o in engine.step()] == [(1, "length")]


def test_failed_step_keeps_previous_tokens() -> None:
    engine, request = make(), ask("a", [1, 2], max_tokens=6)
    want = answers(make("off"), [request])
    run, fail = engine.runner.run, [3]

    def broken(chunks: list[ScheduledChunk], previous_ids: torch.Tensor | None) -> StepResult:
        fail[0] -= 1
        if fail[0] == 0:
            raise MemoryError
        return run(chunks, previous_ids)

    engine.runner.run = broken  # type: ignore[method-assign]
    engine.add(request)
    outputs = engine.step() + engine.step()
    with pytest.raises(MemoryError):
        engine.step()
    outputs += finish(engine)["a"]
    assert {"a": tokens(outputs)} == want


def test_unknown_async_scheduling_is_rejected() -> None:
    assert not make("auto")._async_scheduling  # a CPU
    with pytest.raises(
        ValueError, match=r"^async_scheduling='yes' is not allowed: auto or on or off"
    ):
        make("yes")
