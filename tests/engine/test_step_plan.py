"""A plan computes bitwise what ``InferenceModel`` computes call by call, for every architecture."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kernels import available
from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.runner import Runner
from tests.engine.engine_kit import VOCAB, answer, ask, make_engine, make_model, needs_compiler

pytestmark = needs_compiler
SKIPS = {"skips": True, "attention_gate": True, "n_layer": 5, "document_start": 7}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("classic", {}),
    ("classic", {"softcap": 0.0, "n_embd": 80, "n_head": 5, "n_kv_head": 5}),
    ("modern", {"rope_factor": 2.0}),
    ("modern", SKIPS),
]

BEST, *OTHERS = available() or ["torch"]
LEVELS = [BEST, *(pytest.param(level, marks=pytest.mark.slow) for level in OTHERS)]
"""Of the kernels; each may have to be compiled."""


def engine_of(preset: str, fields: dict[str, Any], **settings: Any) -> Engine:
    return make_engine(make_model(preset, **fields), **settings)


@torch.inference_mode()
def compare(runner: Runner, spans: list[Span], rng: random.Random) -> None:
    count = sum(span.num_tokens for span in spans)
    tokens = torch.tensor([[rng.randrange(VOCAB) for _ in range(count)] for _ in range(2)])
    tokens[0, 0], tokens[1, count // 2] = 7, -1  # a document's start, and a sequence's
    indices = sorted(rng.sample(range(count), rng.randint(1, count)))
    runner.cache.prepare(spans)
    plan = runner._plan
    assert plan is not None
    result = plan.run(tokens.numpy(), indices)
    want = runner.model.logits(runner.model.hidden(*tokens, runner.cache)[indices])
    assert torch.equal(result, want)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("preset", "fields"), MODELS)
def test_plan_equals_calls_bitwise(
    preset: str, fields: dict[str, Any], precision: Any, level: Any
) -> None:
    runner = engine_of(preset, fields, precision=precision, kernels=level).runner
    rng = random.Random(1)
    compare(runner, [Span(0, 0, 1, True)], rng)
    compare(runner, [Span(0, 1, 1, True), Span(2, 0, 30, False), Span(3, 0, 21, False)], rng)
    compare(runner, [Span(s, 31, 1, True) for s in range(4)], rng)  # fewer tokens than before


def test_plan_reads_weights_that_are_loaded_later() -> None:
    engine = engine_of("modern", SKIPS)
    other = make_model.__wrapped__("modern", **SKIPS)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(-0.7)
    answer(engine, ask("a", [1, 2, 3]))
    engine.load_weights(other.state_dict())
    compare(engine.runner, [Span(0, 0, 5, False)], random.Random(2))
    want = answer(make_engine(other), ask("b", [1, 2, 3]))
    assert answer(engine, ask("b", [1, 2, 3])) == want


def test_step_without_logits() -> None:
    runner = engine_of("classic", {}).runner
    assert runner._plan is not None
    runner.cache.prepare([Span(0, 0, 3, False)])
    tokens = torch.zeros((2, 3), dtype=torch.int64).numpy()
    assert runner._plan.run(tokens, []).shape == (0, VOCAB)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int) -> None:
    runner = engine_of("modern", SKIPS, max_num_batched_tokens=64).runner
    before = torch.get_num_threads()
    spans, rng = [Span(0, 0, 40, False), Span(1, 0, 9, False)], random.Random(4)
    tokens = torch.tensor([[rng.randrange(VOCAB) for _ in range(49)] for _ in range(2)]).numpy()
    assert runner._plan is not None
    runner.cache.prepare(spans)
    alone = runner._plan.run(tokens, list(range(49)))
    torch.set_num_threads(threads)
    try:
        assert torch.equal(runner._plan.run(tokens, list(range(49))), alone)
    finally:
        torch.set_num_threads(before)
