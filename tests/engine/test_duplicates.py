"""Samples of one prompt are computed once while their tokens are equal, and no bit changes."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nanochat_ray.engine import runner
from nanochat_ray.engine.duplicates import find_sources
from nanochat_ray.engine.kvcache.slot_cache import SlotCache
from nanochat_ray.engine.request import Request, RequestOutput
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.sequence import Sequence
from tests.engine.engine_kit import ask, finish, make_engine, make_model, needs_compiler
from tests.engine.test_same_tokens import PHRASES, TEXT, TOOL, run_together


def chunk(tokens: list[int], start: int, count: int = 1, prompt: int = 3, **fields: Any) -> Any:
    sequence = Sequence(ask("s", tokens[:prompt]), tokens, seed=0, max_length=99)
    return ScheduledChunk(sequence, start, count, num_logits=1, **fields)


def test_chunks_with_equal_tokens_have_one_source() -> None:
    first = [1, 2, 3, 4, 5]
    chunks = [
        chunk(first, 4),
        chunk([1, 2, 3, 4, 5], 4),
        chunk([1, 2, 3, 9, 5], 4),  # the token before differs
        chunk([9, 2, 3, 4, 5], 4),  # the prompt
        chunk(first, 4, prompt=2),  # the same tokens, of another prompt: no harm
        chunk(first, 4, draft=(6,)),
        chunk(first, 4, input_from_previous_step=0),
        chunk(first, 2, 3),
        chunk([*first, 6], 2, 3),  # a part of a longer one
        chunk([1, 2, 3, 9, 5], 4),
    ]
    assert find_sources(chunks) == [0, 0, 2, 3, 4, 5, 6, 7, 7, 2]
    assert find_sources([*chunks[2:8]]) is None
    assert find_sources([]) is None


def mixture(rng: random.Random) -> list[Request]:
    """Eight samples of each of ten prompts, those of two mixed, with every way to sample."""
    requests = []
    for i in range(10):
        prompt = PHRASES[i % 5] + [i] * rng.randint(1, 9)
        kinds: list[dict[str, Any]] = [
            {"logprobs": 2, "logit_bias": {10: 6.0, 20: 6.0}},  # uses the tool
            {"top_p": 0.5, "logprobs": 0, "logprobs_mode": "processed_logprobs"},
            {"prompt_logprobs": 1},
            {"grammar": {"regex": "(ab|c){1,9}"}},
            {"repetition_penalty": 1.1, "top_k": 5},
        ]
        params = {"temperature": (0.0, 0.05)[i // 5], "max_tokens": 20} | kinds[i % 5]
        # Two have other parameters than the rest.
        requests += [
            ask(f"{i}-{k}", prompt, seed=rng.randrange(2**63), **(params if k < 6 else {}))
            for k in range(8)
        ]
        if i % 2:
            last = requests[-16:]
            rng.shuffle(last)
            requests[-16:] = last
    return requests


def results(settings: dict[str, Any], preempt: float) -> dict[str, list[RequestOutput]]:
    sizes = {"max_num_seqs": 16, "max_num_batched_tokens": 256, "prefill_chunk": 64}
    engine = make_engine(make_model("modern"), TOOL, TEXT, **sizes | settings)
    return run_together(engine, mixture(random.Random(0)), preempt)


def summary(outputs: dict[str, list[RequestOutput]]) -> dict[str, Any]:
    return {
        request_id: (
            [token for o in each for token in o.tokens],
            [logprob for o in each for logprob in o.logprobs or ()],
            [logprob for o in each for logprob in o.prompt_logprobs or ()],
            each[-1].finish,
        )
        for request_id, each in outputs.items()
    }


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("settings", "preempt"),
    [
        ({}, 0.0),
        ({"prefix_cache_tokens": 0, "num_speculative_tokens": 0, "prefill_chunk": 7}, 0.05),
        ({"async_scheduling": "on"}, 0.05),
        ({"precision": "bf16"}, 0.05),
        ({"precision": "int8"}, 0.0),
    ],
)
def test_no_bit_changes(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], preempt: float
) -> None:
    num_copies = 0
    copy = SlotCache.copy_tokens

    def spy(cache: SlotCache, copies: Any) -> None:
        nonlocal num_copies
        num_copies += len(copies)
        copy(cache, copies)

    monkeypatch.setattr(SlotCache, "copy_tokens", spy)
    answers = summary(results(settings, preempt))
    kernels = make_engine(make_model("modern")).stats().kernels
    assert (num_copies > 100) == (kernels != "torch")
    monkeypatch.setattr(runner, "find_sources", lambda chunks: None)
    assert answers == summary(results(settings, preempt))


@needs_compiler
def test_equal_samples_are_computed_once() -> None:
    engine = make_engine(make_model("modern"), max_num_seqs=4, num_speculative_tokens=0)
    rows: list[int] = []
    plan = engine.runner._plan
    assert plan is not None
    run = plan.run

    def spy(tokens: Any, logits_indices: list[int]) -> Any:
        rows.append(tokens.shape[1])
        return run(tokens, logits_indices)

    plan.run = spy  # type: ignore[method-assign]
    for i in range(4):
        engine.add(ask(f"r{i}", [5, 6, 7], max_tokens=6))
    answers = finish(engine)
    assert len({tuple(t for o in each for t in o.tokens) for each in answers.values()}) == 1
    # Three tokens of the prompt, and five of the answer.
    assert rows == [3, 1, 1, 1, 1, 1]
