"""Rollouts by an engine whose weights change between them."""

from __future__ import annotations

import dataclasses
import hashlib

import pytest
import torch

from nanochat_ray.engine.offline import LocalEngine, whole_outputs
from nanochat_ray.engine.request import RequestOutput, SamplingParams, TokenLogprob
from nanochat_ray.evals.answers import make_requests
from nanochat_ray.model.gpt import GPT
from nanochat_ray.rl.rollout import Rollout, rollout_seed, sample_rollouts
from tests.rl.tiny_rl import ENGINE
from tests.tiny import TOKENIZER, tiny_config

PROMPT = list(b"a question that is long enough")
PARAMS = SamplingParams(max_tokens=6, logprobs=0, logprobs_mode="processed_logprobs")


def model(seed: int) -> GPT:
    policy = GPT(tiny_config(sequence_len=48))
    generator = torch.Generator().manual_seed(seed)
    policy.init_weights(generator)
    for p in policy.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return policy.requires_grad_(False)


def answers(engine: LocalEngine, version: int, policy: GPT) -> list[Rollout]:
    engine.load(version, policy.state_dict())
    seeds = [rollout_seed(3, sample) for sample in range(5)]
    return sample_rollouts(engine, make_requests(PROMPT, seeds, PARAMS, "q"))


def local_engine() -> LocalEngine:
    return LocalEngine.from_model(model(0), TOKENIZER, ENGINE)


@pytest.mark.parametrize("drops_cache", [True, False])
def test_keys_and_values_of_old_weights_are_dropped(
    monkeypatch: pytest.MonkeyPatch, drops_cache: bool
) -> None:
    reference = answers(local_engine(), 2, model(1))
    reuse = local_engine()
    first = answers(reuse, 1, model(0))
    assert {rollout.version for rollout in first} == {1}
    if not drops_cache:  # what this test would see
        manager = reuse.engine.runner.kv_manager
        monkeypatch.setattr(manager, "reset_prefix_cache", lambda: None)
    second = answers(reuse, 2, model(1))
    assert reuse.engine.stats().num_hit_tokens > 0
    assert (second == reference) == drops_cache


def test_weights_are_loaded_a_tensor_at_a_time() -> None:
    reference = answers(local_engine(), 2, model(1))
    reuse, weights = local_engine(), model(1).state_dict()
    answers(reuse, 1, model(0))
    requests = make_requests(PROMPT, [rollout_seed(3, sample) for sample in range(5)], PARAMS, "q")
    is_early = reuse.steps(2, weights, requests)
    assert next(is_early) == []
    is_early.close()
    assert reuse.version == -1  # of neither
    steps = list(reuse.steps(2, weights, requests))
    inference_model = reuse.engine.runner.model
    num_tensors = len(inference_model.linears) + len(inference_model.tensors)
    assert steps[:num_tensors] == [[]] * num_tensors
    outputs = [output for step in steps for output in step]
    by_id = {output.request_id: Rollout.of(output) for output in whole_outputs(outputs)}
    assert [by_id[request.id] for request in requests] == reference


def test_tokens_of_a_tool_have_no_logprob() -> None:
    """So they are not trained on."""
    logprobs = [TokenLogprob(logprob=-0.5, top=[]), None]
    output = RequestOutput(
        request_id="q/0", tokens=[5, 6], finish="stop", logprobs=logprobs, weight_version="7"
    )
    assert Rollout.of(output) == Rollout([5, 6], [-0.5, None], "stop", 7)


def test_a_seed_for_each_sample() -> None:
    seeds = [rollout_seed(seed, step, 0) for seed in range(3) for step in range(3)]
    assert len(set(seeds)) == 9
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert rollout_seed(1, 23) != rollout_seed(12, 3)
    digest = hashlib.sha256(b"(1, 23)").digest()
    assert rollout_seed(1, 23) == sum(byte << 8 * i for i, byte in enumerate(digest[:8]))


def test_requests_have_the_seeds() -> None:
    requests = make_requests([1, 2], [7, 9], PARAMS, "q")
    assert [(r.id, r.prompt, r.params.seed) for r in requests] == [
        ("q/0", [1, 2], 7),
        ("q/1", [1, 2], 9),
    ]
    assert all(dataclasses.replace(r.params, seed=PARAMS.seed) == PARAMS for r in requests)


def test_a_failed_request_is_an_error() -> None:
    broken = local_engine()
    nan = {name: torch.full_like(t, torch.nan) for name, t in model(0).state_dict().items()}
    broken.engine.runner.model.load_weights(nan)
    broken.version = 1
    with pytest.raises(RuntimeError, match=r"request q/0 failed: error .*not finite"):
        sample_rollouts(broken, make_requests(PROMPT, [1], PARAMS, "q"))
