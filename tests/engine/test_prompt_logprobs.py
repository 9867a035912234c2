"""Log-probabilities of prompts."""

from __future__ import annotations

import random

import pytest
import torch

from nanochat_ray.engine.request import RequestOutput
from tests.engine.engine_kit import PRESETS, VOCAB, ask, finish, make_engine, make_model, tokens


@pytest.mark.kernels
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("budget", [5, 200])
def test_prompt_logprobs_equal_the_model(preset: str, budget: int) -> None:
    model, rng = make_model(preset), random.Random(1)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (40, 2, 1, 90)]
    engine = make_engine(model, max_num_batched_tokens=budget, prefill_chunk=3)
    engine.add(ask("warm", prompts[0], max_tokens=2))
    finish(engine)  # what is in the prefix cache must be scored too
    for i, prompt in enumerate(prompts):
        engine.add(ask(f"r{i}", prompt, max_tokens=3, prompt_logprobs=2, logprobs=i % 2 or None))
    engine.add(ask("free", prompts[3], max_tokens=3))
    results: dict[str, list[RequestOutput]] = {}
    for _ in range(6):
        for output in engine.step():
            results.setdefault(output.request_id, []).append(output)
    for running in list(engine.scheduler.running):
        engine.preempt(running.request.id)  # some in the middle of their prompts
    finish(engine, results)
    assert all(o.prompt_logprobs is None for o in results["free"])
    assert tokens(results["free"]) == tokens(results["r3"])
    for i, prompt in enumerate(prompts):
        reports = [o.prompt_logprobs for o in results[f"r{i}"] if o.prompt_logprobs is not None]
        with torch.inference_mode():
            logs = model(torch.tensor([prompt]))[0].log_softmax(-1)
        assert len(reports) == 1
        assert len(reports[0]) == len(prompt) - 1
        for position, entry in enumerate(reports[0]):
            want = logs[position]
            assert entry.logprob == pytest.approx(float(want[prompt[position + 1]]), abs=1e-4)
            assert [t for t, _ in entry.top] == want.topk(2).indices.tolist()
            values = want.topk(2).values.tolist()
            assert [x for _, x in entry.top] == pytest.approx(values, abs=1e-4)
        first = results[f"r{i}"][0]
        assert RequestOutput.from_wire(first.to_wire()) == first


@pytest.mark.kernels
@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_scores_from_a_position_use_the_cache(layout: str) -> None:
    """They equal those of the whole prompt, and only the tokens before them are reused."""
    rng = random.Random(2)
    prefix = [rng.randrange(VOCAB) for _ in range(70)]
    prompts = [[*prefix, *(rng.randrange(VOCAB) for _ in range(n))] for n in (5, 9, 30)]
    for budget in (16, 200):
        model = make_model("modern")
        engine = make_engine(model, kv_layout=layout, max_num_batched_tokens=budget)
        whole: list[RequestOutput] = []
        for prompt in prompts:
            engine.add(ask("whole", prompt, max_tokens=0, prompt_logprobs=2))
            whole += finish(engine)["whole"]
        engine.runner.kv_manager.reset_prefix_cache()
        for i, prompt in enumerate(prompts):
            first = 1 if i == 0 else 70
            engine.add(
                ask(f"{i}", prompt, max_tokens=0, prompt_logprobs=2, prompt_logprobs_start=first)
            )
        outputs = finish(engine)
        assert outputs["0"][0].cached_tokens == 0
        for i, prompt in enumerate(prompts):
            (output,) = outputs[f"{i}"]
            assert output.prompt_logprobs is not None
            reference = whole[i].prompt_logprobs
            assert reference is not None
            assert len(output.prompt_logprobs) == len(prompt) - (1 if i == 0 else 70)
            for entry, want in zip(
                output.prompt_logprobs, reference[-len(output.prompt_logprobs) :], strict=True
            ):
                assert entry.logprob == pytest.approx(want.logprob, abs=1e-4)
            assert i == 0 or 48 <= output.cached_tokens <= 69
    with pytest.raises(ValueError, match="prompt_logprobs_start=0"):
        ask("r", [7], prompt_logprobs_start=0)


def test_scoring_uses_the_whole_context() -> None:
    engine = make_engine(make_model("modern"))
    engine.add(ask("r", [7] * 128, max_tokens=0, prompt_logprobs=0))
    (last,) = finish(engine)["r"]
    assert (last.tokens, last.finish) == ([], "length")
    assert last.prompt_logprobs is not None
    assert len(last.prompt_logprobs) == 127
    assert last.prompt_logprobs[0].top == []
    with pytest.raises(ValueError, match="max_tokens=0"):
        ask("r", [7], max_tokens=0)
