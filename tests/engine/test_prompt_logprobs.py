"""Log-probabilities of prompts, and the best of several answers."""

from __future__ import annotations

import random

import pytest
import torch
from engine_kit import PRESETS, VOCAB, ask, finish, make_engine, make_model, tokens

from nanochat_ray.engine.best_of import best, likelihood, spread
from nanochat_ray.engine.request import Output, TokenLogprob


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("budget", [5, 200])
def test_they_are_those_of_the_model_whole_or_in_chunks(preset: str, budget: int) -> None:
    model, rng = make_model(preset), random.Random(1)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (40, 2, 1, 90)]
    engine = make_engine(model, token_budget=budget, prefill_chunk=3)
    engine.add(ask("warm", prompts[0], max_tokens=2))
    finish(engine)  # what is in the prefix cache must be scored too
    for i, prompt in enumerate(prompts):
        engine.add(ask(f"r{i}", prompt, max_tokens=3, prompt_logprobs=2, logprobs=i % 2 or None))
    engine.add(ask("free", prompts[3], max_tokens=3))
    found: dict[str, list[Output]] = {}
    for _ in range(6):
        for output in engine.step():
            found.setdefault(output.request_id, []).append(output)
    for running in list(engine.scheduler.running):
        engine.preempt(running.request.id)  # some in the middle of their prompts
    finish(engine, found)
    assert all(o.prompt_logprobs is None for o in found["free"])
    assert tokens(found["free"]) == tokens(found["r3"])
    for i, prompt in enumerate(prompts):
        told = [o.prompt_logprobs for o in found[f"r{i}"] if o.prompt_logprobs is not None]
        with torch.inference_mode():
            logs = model(torch.tensor([prompt]))[0].log_softmax(-1)
        assert len(told) == 1
        assert len(told[0]) == len(prompt) - 1
        for place, got in enumerate(told[0]):
            want = logs[place]
            assert got.logprob == pytest.approx(float(want[prompt[place + 1]]), abs=1e-4)
            assert [t for t, _ in got.top] == want.topk(2).indices.tolist()
            values = want.topk(2).values.tolist()
            assert [x for _, x in got.top] == pytest.approx(values, abs=1e-4)
        first = found[f"r{i}"][0]
        assert Output.from_wire(first.to_wire()) == first


def test_a_prompt_alone_can_be_scored_up_to_the_whole_context() -> None:
    engine = make_engine(make_model("modern"))
    engine.add(ask("r", [7] * 128, max_tokens=0, prompt_logprobs=0))
    (last,) = finish(engine)["r"]
    assert (last.tokens, last.finish) == ([], "length")
    assert last.prompt_logprobs is not None
    assert len(last.prompt_logprobs) == 127
    assert last.prompt_logprobs[0].top == []
    with pytest.raises(ValueError, match="max_tokens=0"):
        ask("r", [7], max_tokens=0)


def test_the_best_of_several_answers_are_the_likeliest() -> None:
    engine = make_engine(make_model("modern"))
    request = ask("r", [1, 2], temperature=1.0, seed=5, max_tokens=6)
    asked = spread(request, 8)
    for each in asked:
        engine.add(each)
    found = finish(engine)
    answers = [found[each.id] for each in asked]
    assert len({tuple(tokens(a)) for a in answers}) > 4
    engine.add(request)
    assert tokens(finish(engine)["r"]) == tokens(answers[0])
    order = best(answers, 8, "sum")
    sums = [sum(p.logprob for o in answers[i] for p in o.logprobs or () if p) for i in order]
    assert sums == sorted(sums, reverse=True)
    assert best(answers, 3, "sum") == order[:3]


def test_long_answers_are_compared_by_the_token_or_in_all() -> None:
    def made(*values: float, finish: str = "stop") -> list[Output]:
        found = [TokenLogprob(logprob=v, top=[]) for v in values]
        kind = {"finish": finish}
        return [Output(request_id="r", tokens=[1] * len(found), logprobs=[*found], **kind)]  # type: ignore[arg-type]

    answers = [made(-1.0), made(-0.6, -0.6), made(-0.1, finish="error")]
    assert best(answers, 2) == [1, 0]
    assert best(answers, 2, "sum") == [0, 1]
    assert likelihood([Output(request_id="r", finish="length")]) == -float("inf")
    with pytest.raises(ValueError, match="logprobs"):
        likelihood([Output(request_id="r", tokens=[1], finish="stop")])
    with pytest.raises(ValueError, match="n=4"):
        best(answers, 4)
    with pytest.raises(ValueError, match="best_of=0"):
        spread(ask("r", [1]), 0)
