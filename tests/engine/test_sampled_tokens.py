"""Sampled answers of an engine against a loop of full forwards and a sampler of one row."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat_ray.engine import sampler
from nanochat_ray.engine.request import SamplingParams
from nanochat_ray.engine.sampler import SAMPLED, uniform
from nanochat_ray.model.gpt import GPT
from tests.engine.engine_kit import (
    VOCAB,
    ask,
    finish,
    make_engine,
    make_model,
    tokens,
    uncached_greedy,
)
from tests.engine.test_sampler import ALL, rows, slow_choice, slow_weights

PARAMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "top-k": {"top_k": 3},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.3},
    "all": {"top_k": 40, "top_p": 0.9, "min_p": 0.02, "temperature": 1.5},
    "bias": {"logit_bias": {5: 4.0, 9: -100.0, 17: 3.5}},
    "repetition": {"repetition_penalty": 1.8},
    "presence": {"presence_penalty": 2.0, "temperature": 0.0},
    "frequency": {"frequency_penalty": 1.5, "temperature": 0.0},
    "negative": {"frequency_penalty": -1.0, "presence_penalty": -0.5},
    "bias then penalties": {
        "logit_bias": dict.fromkeys(range(0, VOCAB, 9), 6.0),
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "temperature": 0.5,
    },
    "minimum": {"min_tokens": 6, "eos_ids": (5,), "stop_ids": (7,), "logit_bias": {5: 9, 7: 8}},
}


def adjust(logits: Tensor, prompt: list[int], answer: list[int], params: SamplingParams) -> Tensor:
    """Bias, then repetition, frequency and presence, then what may not end it yet."""
    logits = logits.double()
    for token, value in params.logit_bias.items():
        logits[token] += value
    for token in set(prompt + answer):
        strong = params.repetition_penalty
        logits[token] *= 1 / strong if logits[token] > 0 else strong
    for token in set(answer):
        logits[token] -= params.frequency_penalty * answer.count(token)
        logits[token] -= params.presence_penalty
    if len(answer) < params.min_tokens:
        logits[list(params.all_stop_ids)] = -torch.inf
    return logits


def next_token(logits: Tensor, prompt: list[int], answer: list[int], params: SamplingParams) -> int:
    logits = adjust(logits, prompt, answer, params)
    return slow_choice(logits, params, len(prompt) + len(answer))


@torch.inference_mode()
def reference(model: GPT, prompt: list[int], params: SamplingParams, count: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < count:
        context = torch.tensor([prompt + answer])
        answer.append(next_token(model(context)[0, -1], prompt, answer, params))
        if answer[-1] in params.all_stop_ids:
            break
    return answer


@pytest.mark.parametrize("preset", ["modern", "classic"])
def test_sampled_answers_are_the_references(preset: str) -> None:
    model, rng = make_model(preset), random.Random(0)
    engine = make_engine(model, max_num_seqs=5)
    requests = [
        ask(name, [rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))],
            **{"temperature": 1.0, "seed": rng.getrandbits(64), "max_tokens": 12} | fields)
        for name, fields in PARAMS.items()
    ]  # fmt: skip
    for request in requests:
        engine.add(request)
    outputs = finish(engine)
    for r in requests:
        assert tokens(outputs[r.id]) == reference(model, list(r.prompt), r.params, 12), r.id


@torch.inference_mode()
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_processed_logprobs_are_of_the_sampled_distribution(kernels: str) -> None:
    """Beside requests with raw ones, which stay those of the model."""
    model, rng = make_model("modern"), random.Random(0)
    engine = make_engine(model, max_num_seqs=5, kernels=kernels)
    requests = []
    for mode in ("processed_logprobs", "raw_logprobs"):
        for name, fields in PARAMS.items():
            prompt = [rng.randrange(VOCAB) for _ in range(9)]
            values = {"temperature": 1.0, "seed": rng.getrandbits(64), "max_tokens": 8} | fields
            request = ask(f"{mode} {name}", prompt, logprobs=2, logprobs_mode=mode, **values)
            requests.append(request)
            engine.add(request)
    outputs = finish(engine)
    for r in requests:
        answer: list[int] = []
        for output in outputs[r.id]:
            for token, entry in zip(output.tokens, output.logprobs or [], strict=True):
                logits = model(torch.tensor([[*r.prompt, *answer]]))[0, -1]
                weights = dict(enumerate(logits.double().softmax(-1).tolist()))
                if r.params.reports_processed_logprobs:
                    weights = slow_weights(
                        adjust(logits, list(r.prompt), answer, r.params), r.params
                    )
                total = sum(weights.values())
                assert entry is not None
                assert entry.logprob == pytest.approx(math.log(weights[token] / total), abs=2e-4)
                top, value = entry.top[0]
                assert value == pytest.approx(math.log(max(weights.values()) / total), abs=2e-4)
                assert top in weights
                answer.append(token)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("kv_layout", ["slots", "paged"])
def test_window_shorter_than_the_context(kv_layout: str, kernels: str) -> None:
    """Of 300 tokens a short window holds 128; answers begin before it, in it and after it."""
    model = make_model("modern", sequence_len=300)
    engine = make_engine(
        model, kv_layout=kv_layout, kernels=kernels, max_num_batched_tokens=64, prefill_chunk=40
    )
    rng = random.Random(1)
    prompts = {str(n): [rng.randrange(VOCAB) for _ in range(n)] for n in (120, 129, 200, 280)}
    for name, prompt in prompts.items():
        engine.add(ask(name, prompt))
    outputs = finish(engine)
    for name, prompt in prompts.items():
        assert tokens(outputs[name]) == uncached_greedy(model, prompt, 16)
    whole = make_model("modern", sequence_len=300, window_pattern="L")
    assert uncached_greedy(whole, prompts["280"], 16) != tokens(outputs["280"])


def test_recorded_noise() -> None:
    """SplitMix64's finaliser of the seed's hash and the position; 52 bits of it."""
    for seed, position, value in (
        (0, 0, 0.0),
        (0, 1, 0.8833108082136425),
        (1, 0, 0.4793099186055876),
        (2**64 - 1, 7, 0.4716411416208315),
        (5, 100_000, 0.04764568352264309),
    ):
        noise = uniform(torch.tensor(sampler.to_int64(seed)), torch.tensor(position))
        assert float(noise) == value


@pytest.mark.parametrize(
    ("fields", "want_ids"),
    # Of 0.1, 0.2, 0.3 and 0.4, with the noise 0.883, 0.479, 0.472 and 0.048 above.
    [
        ({}, [3, 2, 2, 0]),
        ({"top_k": 2}, [3, 3, 3, 2]),  # 3/7, 4/7
        ({"top_p": 0.65}, [3, 3, 3, 2]),
        ({"top_p": 0.75}, [3, 2, 2, 1]),  # 2/9, 5/9
        ({"min_p": 0.45}, [3, 2, 2, 1]),
        ({"min_p": 0.76}, [3, 3, 3, 3]),
        ({"temperature": 0.5}, [3, 3, 3, 1]),  # 1/30, 5/30, 14/30
        ({"top_k": 3, "top_p": 0.7}, [3, 3, 3, 2]),  # 7/9 of the three suffice
        ({"temperature": 0.0}, [3, 3, 3, 3]),
    ],
)
def test_samples_by_hand(fields: dict[str, Any], want_ids: list[int]) -> None:
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(4, -1)
    params = [
        SamplingParams(**{"temperature": 1.0, "seed": s} | fields) for s in (0, 1, 2**64 - 1, 5)
    ]
    positions = torch.tensor([1, 0, 7, 100_000])
    features = ALL if len(fields) else SAMPLED
    assert sampler.choose(logits, rows(params), positions, features).tolist() == want_ids


def test_rows_without_finite_logits_are_invalid() -> None:
    logits = torch.zeros(4, 3)
    logits[0, 1] = torch.nan
    logits[1] = -torch.inf
    logits[2, 2] = torch.inf
    for temperature in (0.0, 1.0):
        params = [SamplingParams(temperature=temperature, seed=0)] * 4
        actual = sampler.choose(logits, rows(params), torch.arange(4), SAMPLED).tolist()
        assert actual[:3] == [sampler.INVALID] * 3
        assert actual[3] >= 0
    assert sampler.greedy(logits).tolist() == [-1, -1, -1, 0]


def test_log_probabilities_by_hand() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.15, 0.05]])
    own, ids, values = sampler.log_probabilities(p.log() + 5, torch.tensor([1, -1]), 2)
    torch.testing.assert_close(own, torch.tensor([0.2, 0.7]).log())
    assert ids.tolist() == [[3, 2], [0, 2]]
    torch.testing.assert_close(values, torch.tensor([[0.4, 0.3], [0.7, 0.15]]).log())
    assert sampler.log_probabilities(p.log(), torch.tensor([1, 1]), 0)[1].shape == (2, 0)


def test_only_marked_tokens_are_allowed() -> None:
    logits = torch.arange(8.0).view(2, 4)
    marks = torch.tensor([[True, False, True, False]])
    masked_logits = sampler.mask_rows(logits, torch.tensor([1]), marks)
    assert masked_logits.tolist() == [[0, 1, 2, 3], [4, -torch.inf, 6, -torch.inf]]
