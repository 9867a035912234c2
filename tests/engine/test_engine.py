"""The engine equals the definition, whatever else it does at the time."""

from __future__ import annotations

import dataclasses
import random
import time
from typing import Any

import pytest
import torch

from nanochat_ray.engine.request import EngineFull, Request, RequestOutput, SamplingParams
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tools import Tool
from tests.engine.engine_kit import (
    PRESETS,
    VOCAB,
    answer,
    ask,
    finish,
    make_engine,
    make_model,
    tokens,
    uncached_greedy,
)


def prompts(rng: random.Random, count: int, longest: int = 60) -> list[list[int]]:
    return [[rng.randrange(VOCAB) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def random_requests(rng: random.Random, count: int, **params: object) -> list[Request]:
    """A mixture of every way to sample."""
    requests = []
    for i, prompt in enumerate(prompts(rng, count)):
        kind = rng.choice(["greedy", "plain", "k", "p", "min_p", "all", "penalties"])
        sampling: dict[str, object] = {
            "max_tokens": rng.randint(1, 24),
            "seed": rng.randrange(2**63),
        }
        if kind != "greedy":
            sampling["temperature"] = rng.choice([0.5, 1.0, 1.7])
        if kind in ("k", "all"):
            sampling["top_k"] = rng.randint(1, 50)
        if kind in ("p", "all"):
            sampling["top_p"] = rng.choice([0.3, 0.9])
        if kind in ("min_p", "all"):
            sampling["min_p"] = 0.05
        if kind == "penalties":
            sampling |= {
                "repetition_penalty": 1.3,
                "presence_penalty": 0.5,
                "frequency_penalty": 0.2,
            }
            sampling |= {"logit_bias": {7: 3.0, 9: -100.0}, "stop_ids": (3, 5), "min_tokens": 1}
        requests.append(ask(f"r{i}", prompt, **sampling | params))
    return requests


@pytest.mark.kernels
@pytest.mark.parametrize("preset", PRESETS)
def test_equals_uncached_greedy_under_stress(preset: str) -> None:
    rng, model = random.Random(3), make_model(preset)
    engine = make_engine(model)
    workload = [
        ask(f"r{i}", p, max_tokens=rng.randint(1, 20)) for i, p in enumerate(prompts(rng, 24))
    ]
    want = {r.id: uncached_greedy(model, list(r.prompt), r.params.max_tokens) for r in workload}
    actual: dict[str, list[RequestOutput]] = {r.id: [] for r in workload}
    coming, aborted_ids = list(workload), set()
    while coming or engine.has_work:
        for _ in range(rng.randint(0, 3)):
            if coming:
                engine.add(coming.pop())
        live = [
            r.id for r in workload if r not in coming and not any(o.finish for o in actual[r.id])
        ]
        if live and rng.random() < 0.1:
            victim = rng.choice(live)
            if engine.abort(victim):
                aborted_ids.add(victim)
        elif live and rng.random() < 0.2:
            engine.preempt(rng.choice(live))
        for output in engine.step():
            actual[output.request_id].append(output)
        engine.check_integrity()
    assert aborted_ids
    assert engine.stats().preemptions > 3
    for request in workload:
        output_ids, ends = (
            tokens(actual[request.id]),
            [o.finish for o in actual[request.id] if o.finish],
        )
        if request.id in aborted_ids:
            assert ends == ["abort"]
            assert output_ids == want[request.id][: len(output_ids)]
        else:
            assert ends == ["length"]
            assert output_ids == want[request.id]


@pytest.mark.kernels
@pytest.mark.parametrize("preset", PRESETS)
def test_seeded_tokens_do_not_depend_on_batch(preset: str) -> None:
    rng, model = random.Random(5), make_model(preset)
    workload = random_requests(rng, 16)
    alone = {r.id: answer(make_engine(model, max_num_seqs=1), r) for r in workload}

    together = make_engine(model, max_num_seqs=16, max_num_batched_tokens=256)
    for request in workload:
        together.add(request)
    assert {k: tokens(v) for k, v in finish(together).items()} == alone

    other_engine = make_engine(model, max_num_seqs=3, max_num_batched_tokens=5, prefill_chunk=2)
    actual: dict[str, list[RequestOutput]] = {}
    for request in rng.sample(workload, len(workload)):
        other_engine.add(request)
        for output in other_engine.step():
            actual.setdefault(output.request_id, []).append(output)
        running = [s.request.id for s in other_engine.scheduler.running]
        if running and rng.random() < 0.5:
            other_engine.preempt(rng.choice(running))
    assert {k: tokens(v) for k, v in finish(other_engine, actual).items()} == alone


@torch.inference_mode()
def logits_of(
    model: GPT, prompt: list[int], budget: int, company: int, **settings: Any
) -> torch.Tensor:
    """Logits after the prompt and after one decode, beside other requests."""
    settings |= {"max_num_seqs": 32, "max_num_batched_tokens": 32 + budget, "prefill_chunk": budget}
    settings |= {"num_speculative_tokens": 0}  # one row of logits for each sequence
    engine = make_engine(model, **settings)
    rng = random.Random(company)
    for i, other in enumerate(prompts(rng, company)):
        engine.add(ask(f"other{i}", other, max_tokens=40))
    for _ in range(3):
        engine.step()
    all_logits: list[torch.Tensor] = []
    run = engine.runner.run

    def spy(chunks, previous_ids):  # type: ignore[no-untyped-def]
        result = run(chunks, previous_ids)
        request_ids = [c.sequence.request.id for c in chunks if c.samples]
        if "me" in request_ids:
            all_logits.append(result.logits[request_ids.index("me")].clone())
        return result

    engine.runner.run = spy  # type: ignore[method-assign]
    engine.add(ask("me", prompt, max_tokens=4))
    finish(engine)
    return torch.stack(all_logits)


SHAPES: list[dict[str, int]] = [
    {},
    {"n_kv_head": 4},
    {"n_embd": 384, "n_head": 3, "n_kv_head": 3},
]


@pytest.mark.kernels
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_do_not_depend_on_batch(shape: dict[str, int]) -> None:
    """Bitwise by slot with the kernels in C, which are made for it; near with torch's, whose order
    of sums is the CPU's."""
    check_batches(shape, {})


PAGED = {"kv_layout": "paged", "kv_tokens": 4096}


@pytest.mark.parametrize("settings", [{"kernels": "torch"}, PAGED])
@pytest.mark.parametrize("shape", SHAPES)
def test_other_logits_are_near_in_any_batch(
    shape: dict[str, int], settings: dict[str, Any]
) -> None:
    check_batches(shape, settings)


def check_batches(shape: dict[str, int], settings: dict[str, Any]) -> None:
    model = make_model.__wrapped__("modern", sequence_len=640, **shape)
    bitwise = not settings and make_engine(model).stats().kernels != "torch"
    prompt = prompts(random.Random(8), 1)[0] * 12
    prompt = prompt[:300]
    alone = logits_of(model, prompt, budget=600, company=0, **settings)
    for budget, company in ((600, 3), (7, 17), (33, 0)):
        logits = logits_of(model, prompt, budget, company, **settings)
        if bitwise:
            assert torch.equal(logits, alone)
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)


@pytest.mark.kernels
def test_chunked_prefill_equals_the_plain_forward(subtests: pytest.Subtests) -> None:
    for preset in PRESETS:
        model = make_model(preset)
        prompt = prompts(random.Random(2), 1, 100)[0]
        with torch.inference_mode():
            want = model(torch.tensor([prompt]))[0, -1]
        for budget in (1, 5, 16, 200):
            with subtests.test(preset=preset, budget=budget):
                actual = logits_of(model, prompt, budget, 0)[0]
                torch.testing.assert_close(actual, want, atol=2e-5, rtol=0)


@pytest.mark.kernels
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_continuation_on_another_engine(temperature: float) -> None:
    model = make_model("modern")
    request = ask("r", [5, 6, 7], max_tokens=20, temperature=temperature, seed=11, top_p=0.9)
    whole = answer(make_engine(model), request)
    for cut in range(1, 20):
        later = dataclasses.replace(request, output_token_ids=whole[:cut])
        assert whole[:cut] + answer(make_engine(model), later) == whole
    other_engine = make_engine(model)
    other_engine.add(dataclasses.replace(request, output_token_ids=whole))
    assert [(o.tokens, o.finish) for o in other_engine.step()] == [([], "length")]


def test_tool_output_survives_continuation() -> None:
    model, prompt = make_model("modern"), [1, 2, 3]
    params: dict[str, float] = {"temperature": 1.5, "seed": 4}
    free = answer(make_engine(model), ask("free", prompt, max_tokens=6, **params))
    assert len(set(free)) == 6
    # Tokens that the model happens to write serve as the marks of the tool.
    tool = Tool(free[2], free[5], 290, 291, lambda ids: [*reversed(ids), 50])
    request = ask("r", prompt, max_tokens=16, **params)
    engine = make_engine(model, tool)
    engine.add(request)
    outputs = finish(engine)["r"]
    whole, output = tokens(outputs), [290, *reversed(free[3:5]), 50, 291]
    assert whole[:11] == [*free, *output]
    assert [o.tokens[i] for o in outputs for i in o.tool_token_indices][:5] == output
    # Behind the output the model continues as if it had been in the prompt.
    after = dataclasses.replace(request, prompt=prompt + whole[:11], output_token_ids=[])
    assert whole[11:] == answer(make_engine(model), after)[: len(whole) - 11]
    for cut in range(1, 16):
        later = dataclasses.replace(request, output_token_ids=whole[:cut])
        assert whole[:cut] + answer(make_engine(model, tool), later) == whole
    short = dataclasses.replace(request, params=dataclasses.replace(request.params, max_tokens=8))
    assert answer(make_engine(model, tool), short) == whole[:8]


def test_concurrent_requests_share_a_prefix() -> None:
    """Nobody computes what another computes just now, and chunks are kept as they are done."""
    model, start = make_model("classic"), list(range(7, 71))
    workload = [
        Request(id=str(i), prompt=[*start, i, 200 - i], params=SamplingParams(max_tokens=4, seed=i))
        for i in range(4)
    ]
    results = []
    for capacity in (0, 512):
        engine = make_engine(
            model, prefix_cache_tokens=capacity, max_num_batched_tokens=64, prefill_chunk=64
        )
        for request in workload:
            engine.add(request)
        results.append({k: tokens(v) for k, v in finish(engine).items()})
        assert engine.stats().num_hit_tokens == (3 * len(start) if capacity else 0)
    assert results[0] == results[1]


@pytest.mark.kernels
def test_prefix_hits_change_no_token() -> None:
    rng, model = random.Random(6), make_model("modern")
    prefix = [rng.randrange(VOCAB) for _ in range(70)]
    workload = [
        ask(f"r{i}", prefix[: rng.randint(1, 70)] + tail, temperature=1.0, seed=i)
        for i, tail in enumerate(prompts(rng, 20, 30))
    ]
    results = []
    for capacity in (0, 64, 4096):
        engine = make_engine(model, prefix_cache_tokens=capacity)
        outputs: dict[str, list[RequestOutput]] = {}
        for request in workload:
            engine.add(request)
            outputs |= {k: outputs.get(k, []) + v for k, v in finish(engine).items()}
        results.append({k: tokens(v) for k, v in outputs.items()})
        stats = engine.stats()
        assert stats.num_hit_tokens == sum(o.cached_tokens for v in outputs.values() for o in v)
        assert (stats.num_hit_tokens > 300) == (capacity > 0)
        assert stats.prompt_tokens == sum(len(r.prompt) for r in workload) - stats.num_hit_tokens
    assert results[0] == results[1] == results[2]


def test_stop_eos_min_tokens_and_lengths() -> None:
    model, prompt = make_model("modern"), [9, 8]
    free = uncached_greedy(model, prompt, 16)
    engine = make_engine(model)
    stop = free[4]
    first = free.index(stop)
    assert answer(engine, ask("a", prompt, stop_ids=(stop,))) == free[: first + 1]
    assert answer(engine, ask("b", prompt, eos_ids=(stop,))) == free[: first + 1]
    assert answer(engine, ask("c", prompt, eos_ids=(stop,), ignore_eos=True)) == free
    later = answer(engine, ask("d", prompt, stop_ids=(free[0],), min_tokens=5))
    assert len(later) >= 5
    assert free[0] not in later[:4]
    engine.add(ask("e", [1] * 127, max_tokens=50))
    (last,) = finish(engine)["e"]
    assert (len(last.tokens), last.finish) == (1, "length")


@pytest.mark.kernels
def test_logprobs_are_those_of_the_model() -> None:
    model, prompt = make_model("modern"), [4, 5, 6]
    engine = make_engine(model)
    engine.add(ask("r", prompt, max_tokens=3, logprobs=2, temperature=1.0, seed=1))
    engine.add(ask("other", prompt, max_tokens=3))
    results = finish(engine)
    output_ids = tokens(results["r"])
    with torch.inference_mode():
        logs = model(torch.tensor([prompt + output_ids]))[0].log_softmax(-1)
    for i, output in enumerate(results["r"]):
        assert output.logprobs is not None
        logprob = output.logprobs[0]
        assert logprob is not None
        want = logs[len(prompt) + i - 1]
        assert logprob.logprob == pytest.approx(float(want[output_ids[i]]), abs=1e-4)
        assert [t for t, _ in logprob.top] == want.topk(2).indices.tolist()
    assert results["other"][0].logprobs is None
    assert RequestOutput.from_wire(results["r"][0].to_wire()) == results["r"][0]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ask("r", [1] * 128), ["128 tokens", "holds 128"]),
        (ask("r", []), ["prompt"]),
        (ask("r", [1, VOCAB]), ["prompt=300", "299"]),
        (ask("r", [1], stop_ids=(-1,)), ["stop_ids=-1"]),
    ],
)
def test_impossible_requests_are_rejected(request_: Request, words: list[str]) -> None:
    engine = make_engine(make_model("classic"))
    with pytest.raises(ValueError, match=r"prompt|stop_ids") as caught:
        engine.add(request_)
    assert all(word in str(caught.value) for word in words)
    assert not engine.has_work


def test_full_queue_and_duplicate_id_are_rejected() -> None:
    engine = make_engine(make_model("classic"), max_num_seqs=1, max_queue_size=2)
    for i in range(3):
        engine.add(ask(f"r{i}", [1]))
    with pytest.raises(EngineFull, match="max_queue_size=2"):
        engine.add(ask("r3", [1]))
    with pytest.raises(ValueError, match="'r0'"):
        engine.add(ask("r0", [1]))
    assert engine.abort("r2")
    assert not engine.abort("r2")
    engine.add(ask("r3", [1]))
    finish(engine)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("top_k", -1),
        ("min_p", 1.5),
        ("max_tokens", 0),
        ("min_tokens", 99),
        ("seed", 2**64),
        ("stop", ("",)),
        ("logprobs", 21),
        ("logprobs", 1.5),
        ("prompt_logprobs", -1),
        ("top_k", True),
        ("stop", (1,)),
        ("stop_ids", ("a",)),
        ("priority", 0.5),
        ("deadline", "soon"),
        ("logit_bias", {1: 200.0}),
        ("presence_penalty", 3.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_parameters_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field}="):
        ask("r", [1], **{field: value})


def test_deadline_ends_waiting_and_running(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    engine = make_engine(make_model("classic"), max_num_seqs=1)
    engine.add(ask("runs", [1], max_tokens=100, deadline=1000.5))
    engine.add(ask("late", [1], deadline=998.75))
    engine.add(ask("free", [1], max_tokens=2))
    first = engine.step()
    assert [(o.request_id, o.finish) for o in first] == [("late", "error"), ("runs", None)]
    assert first[0].error == "deadline: it passed 1.250 s ago, with 0 tokens generated"
    now = 1000.5
    results = finish(engine)
    error = "deadline: it passed 0.000 s ago, with 1 tokens generated"
    assert [o.error for o in results["runs"]] == [error]
    assert len(tokens(results["free"])) == 2


def test_requests_survive_the_wire() -> None:
    import json

    request = ask(
        "r", [1, 2], output_token_ids=[3], logit_bias={4: 1.5}, stop=("a",), stop_ids=(7,)
    )
    assert Request.from_wire(json.loads(json.dumps(request.to_wire()))) == request
