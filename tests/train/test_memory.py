"""The estimate of memory against runs that were measured, and what it refuses."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from nanochat_ray.config import from_json, to_json
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import DTYPES
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.train import memory, recipe
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.step import Batch, train_step
from tests.processes import call

SHAPE = recipe.model_config(4, 2048, sequence_len=128)


def train_config(**fields: Any) -> TrainConfig:
    values = {
        "steps": 10,
        "global_batch_size": 16,
        "micro_batch_size": 16,
        "precision": "bf16",
        **fields,
    }
    return TrainConfig(**values)


def allocated_peak(model_values: dict[str, Any], train_values: dict[str, Any]) -> int:
    """Most bytes that torch's allocator holds in a step beside the copies of a checkpoint.

    Counted, because a process's resident memory depends on the CPU, libc and what is loaded.
    """
    config = from_json(ModelConfig, model_values)
    train = from_json(TrainConfig, train_values)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model = GPT(config, DTYPES[train.precision])
        model.init_weights(torch.Generator().manual_seed(0))
        model.checkpoint_activations = train.checkpoint_activations
        optimizer = ShardedOptimizer(model, train.optim, model.compute_dtype)
        shape = (train.global_batch_size, config.sequence_len + 1)
        ids = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(1))
        # A step of one row makes the optimizer's state.
        one = dataclasses.replace(train, global_batch_size=1, micro_batch_size=1)
        train_step(model, optimizer, Batch(ids[:1].numpy()), 0, one)
        _copies = [optimizer.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}]
        train_step(model, optimizer, Batch(ids.numpy()), 1, train)
    changes = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    changes.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in changes))


@pytest.mark.slow
@pytest.mark.timeout(300)  # bf16 is slow on a CPU with AVX2 alone
@pytest.mark.parametrize(
    "changes",
    [{}, {"checkpoint_activations": True}, {"precision": "fp32"}],
    ids=["bf16", "checkpointed", "fp32"],
)
def test_estimate_is_just_above_the_peak(changes: dict[str, Any]) -> None:
    train = train_config(global_batch_size=8, micro_batch_size=8, **changes)
    peak = call(allocated_peak, to_json(SHAPE), to_json(train), timeout_s=280)
    estimate = memory.estimate(SHAPE, train, world=1, on_gpu=False)
    assert peak < estimate.total - estimate.runtime < 1.35 * peak, estimate


@pytest.mark.parametrize(
    ("depth", "micro", "recompute", "gib"),
    # Without a CUDA context; train/BENCHMARKS.md.
    [(12, 32, False, 23.29), (12, 8, False, 10.0), (20, 16, False, 41.01), (12, 32, True, 9.29)],
)
def test_estimate_is_near_cudas_allocator(
    depth: int, micro: int, recompute: bool, gib: float
) -> None:
    train = train_config(
        global_batch_size=micro, micro_batch_size=micro, checkpoint_activations=recompute
    )
    estimate = memory.estimate(recipe.model_config(depth, 32_768), train, world=1, on_gpu=True)
    assert (estimate.total - estimate.runtime) / 2**30 == pytest.approx(gib, rel=0.1)


# Tables of 128 × 32 and heads of 16 channels: 57,402 parameters, of which 45,080 are matrices.
SMALL = ModelConfig.modern(
    vocab_size=100, n_layer=4, n_head=2, n_kv_head=1, n_embd=32, sequence_len=64
)
# One sequence of 20 tokens, more than the 16 whose logits exist at one time.
WIDE_VOCABULARY = ModelConfig.modern(
    vocab_size=70_000, n_layer=1, n_head=1, n_kv_head=1, n_embd=16, sequence_len=20
)
BY_HAND: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "fp32 on a CPU": (
        {"precision": "fp32"},
        {
            "optimizer": 4 * (45_080 + 2 * 12_322),
            # Per layer 14 times the width, k and v, and the values' gate; the current layer's
            # hidden gradients; embedding, smear, backout and norm. Then a table's gradient.
            "activations": int(1.12 * 4 * 128 * (4 * (14 * 32 + 2 * 16 + 16) + 12 * 32 + 192))
            + 4 * 4096,
            "logits": 128 * 100 * (12 + 4) + (4 + 4) * 4096,
            "update": 4 * 4 * 32 * 32 * (12 + 16),
            "checkpoint": 4 * (45_080 + 2 * 12_322) + 4 * 57_402,
        },
    ),
    "bf16, recomputed, the second of three": (
        {"checkpoint_activations": True, "world": 3, "rank": 1},
        {
            "optimizer": 4 * (15_027 + 2 * 4_108),
            # The layers' inputs, one layer, and the cast matrices of one.
            "activations": int(
                1.12 * 2 * 128 * (4 * 32 + 14 * 32 + 2 * 16 + 2 * 16 + 12 * 32 + 192)
            )
            + 2 * 11_270
            + 4 * 4096,
            "logits": 128 * 100 * (12 + 2) + (4 + 2) * 4096,
            # Of a stack of 16,384 elements, and this rank's share of the weights.
            "update": 5_462 * (12 + 8) + 4 * 19_134,
            "checkpoint": 4 * (45_080 + 2 * 12_322),
        },
    ),
    "bf16 on the first of two GPUs": (
        {"world": 2, "on_gpu": True},
        {
            "optimizer": 4 * (22_540 + 2 * 6_161),
            "activations": int(1.05 * 2 * 128 * (4 * (12 * 32 + 2 * 16 + 8) + 20 * 32 + 192))
            + 2 * 45_080
            + 4 * 4096,
            "logits": 128 * 100 * 2 + (4 + 2) * 4096,
            "update": 8_192 * (12 + 8),
            "checkpoint": 0,
        },
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_estimates_by_hand(case: str) -> None:
    values, golden = BY_HAND[case]
    options = {"world": 1, "on_gpu": False, "rank": 0}
    train = train_config(
        micro_batch_size=2, **{k: v for k, v in values.items() if k not in options}
    )
    options |= {k: v for k, v in values.items() if k in options}
    result = memory.estimate(SMALL, train, **options)  # type: ignore[arg-type]
    assert {name: getattr(result, name) for name in golden} == golden
    assert result.weights == result.gradients == 4 * 57_402
    assert result.runtime == (1 << 30 if options["on_gpu"] else int(0.45 * (1 << 30)))
    lasting = result.runtime + 2 * result.weights + result.optimizer + result.checkpoint
    assert result.total == lasting + result.activations + result.logits
    assert dataclasses.replace(result, update=1 << 30).total == lasting + (1 << 30)


def test_wide_tables_by_hand() -> None:
    train = train_config(global_batch_size=1, micro_batch_size=1, precision="fp32")
    result = memory.estimate(WIDE_VOCABULARY, train, world=1, on_gpu=False)
    assert result.logits == 16 * 70_000 * (12 + 4) + (4 + 4) * 70_016 * 16
    assert result.update == 70_016 * 16 * 8  # AdamW's, since the matrices are few
    many = dataclasses.replace(WIDE_VOCABULARY, n_layer=5)
    assert memory.estimate(many, train, world=1, on_gpu=False).update == 70_016 * 48 * 8


def test_refusal_names_what_would_fit() -> None:
    model = recipe.model_config(12, 32_768)
    train = train_config(global_batch_size=256, micro_batch_size=32)
    estimate = memory.check_memory(model, train, world=1, on_gpu=True, free=80 << 30)
    assert estimate.total < 80 << 30
    with pytest.raises(memory.DoesNotFitError) as error:
        memory.check_memory(model, train, world=1, on_gpu=True, free=24 << 30)
    text = str(error.value)
    assert "micro_batch_size=32 needs about 25" in text
    assert (
        "24.0 GiB are free: what would fit: micro_batch_size=16 or checkpoint_activations" in text
    )
    for changes in ({"micro_batch_size": 16}, {"checkpoint_activations": True}):
        memory.check_memory(
            model, dataclasses.replace(train, **changes), world=1, on_gpu=True, free=24 << 30
        )
    # The state alone is too much for one, not for many.
    deep = recipe.model_config(26, 32_768)
    with pytest.raises(memory.DoesNotFitError, match=r"would fit: workers=2$"):
        memory.check_memory(
            deep,
            train_config(global_batch_size=64, micro_batch_size=1, checkpoint_activations=True),
            world=1,
            on_gpu=True,
            free=24 << 30,
        )
    with pytest.raises(memory.DoesNotFitError, match="a smaller depth would fit"):
        memory.check_memory(deep, train, world=1, on_gpu=True, free=4 << 30)


def test_workers_share_the_optimizer_state() -> None:
    model = recipe.model_config(12, 32_768)
    one, eight = (memory.estimate(model, train_config(), world=n, on_gpu=True) for n in (1, 8))
    assert eight.optimizer == pytest.approx(one.optimizer / 8, rel=0.01)
    assert eight.weights == one.weights
    half = memory.estimate(model, train_config(micro_batch_size=8), world=1, on_gpu=True)
    assert half.activations < 0.6 * one.activations
