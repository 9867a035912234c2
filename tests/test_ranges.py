"""Defaults of the configurations, and their ranges to the bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nanochat_ray.model.config import ModelConfig
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.train.config import TrainConfig

MODEL = {
    "vocab_size": 300,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 32,
    "sequence_len": 64,
}
TRAIN = {"steps": 3, "global_batch_size": 4, "micro_batch_size": 2, "precision": "bf16"}
RANGES: dict[str, tuple[type, dict[str, Any], dict[str, tuple[list[Any], list[Any]]]]] = {
    "model": (
        ModelConfig,
        MODEL,
        {
            "vocab_size": ([1], [0, 2.5]),
            "n_layer": ([1], [0]),
            "n_head": ([2, 16], [0]),
            "n_kv_head": ([1, 4], [0, 3, 8]),
            "n_embd": ([8, 16], [0, 4, 12]),  # an even number in each head
            "sequence_len": ([1], [0]),
            "pad_vocab_to": ([1], [0]),
            "window_pattern": (["S", "LLS"], ["", "LX"]),
            "softcap": ([0], [-1e-9, math.inf]),
            "residual_decay": ([0, 2], [-1e-9]),
            "dropout": ([0, 0.999], [-1e-9, 1]),
            "rope_base": ([1e-9], [0]),
            "norm_eps": ([0], [-1e-9, math.nan]),
            "rope_factor": ([1], [0.999]),
            "document_start": ([-1, 0, 299], [-2, 300]),
        },
    ),
    "train": (
        TrainConfig,
        TRAIN,
        {
            "steps": ([1], [0, True]),
            "global_batch_size": ([2], [0, 3]),
            "micro_batch_size": ([1], [0]),
            "keep_latest_k": ([1], [0]),
            **dict.fromkeys(
                ("eval_every", "save_every", "eval_sequences", "sample_tokens"), ([0], [-1])
            ),
            "precision": (["fp32"], ["fp8"]),
            "stage": (["base", "sft", "rl"], ["chat"]),
            "compile": (["auto", "on", "off"], [True]),
            "fp8": ([False, True], []),
            "window_warmup": ([0, 1], [-1e-9, 1.001]),
            "save_timeout_s": ([0], [-1e-9]),
            "spike_clip": ([0, 1.001], [1, 0.5, -1]),
        },
    ),
    "rl": (
        RLConfig,
        {},
        {
            "tasks": ([("a", "b")], [()]),
            **dict.fromkeys(
                ("pool", "questions", "min_groups", "max_rounds", "max_tokens"), ([1], [0])
            ),
            **dict.fromkeys(("eval_questions", "eval_samples"), ([1], [0])),
            "samples": ([2], [1]),
            "loss": (["rloo", "cispo"], ["ppo"]),
            "truncation": (["wrong", "mask", "grade"], ["drop"]),
            "temperature": ([0.2, 5], [0.199, 5.001]),
            "stale": ([0, 1], [2, -1]),
            "clip_low": ([0, 1], [-1e-9, 1.001]),
            "clip_high": ([0, 9], [-1e-9]),
            "kl": ([0, 9], [-1e-9]),
            "rehearsal": ([None, 0, 9], [-1e-9]),
            "max_logprob_diff": ([None, 0], [-1e-9]),
        },
    ),
}
CASES = [(config, name) for config, (_, _, fields) in RANGES.items() for name in fields]


@pytest.mark.parametrize(("config", "name"), CASES)
def test_ranges_to_their_bounds(config: str, name: str) -> None:
    cls, values, fields = RANGES[config]
    inside, outside = fields[name]
    for value in inside:
        assert getattr(cls(**{**values, name: value}), name) == value
    for value in outside:
        with pytest.raises(ValueError, match=f"^{name}="):
            cls(**{**values, name: value})


def test_fields_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"^fp8=True is not allowed: only in bf16"):
        TrainConfig(**{**TRAIN, "precision": "fp32", "fp8": True})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^residual_decay=1\.1 is not allowed"):
        ModelConfig(**MODEL, residual_decay=1.1, residual_scalars=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^tasks='a' is not allowed: each task once"):
        RLConfig(tasks=("a", "b", "a"))


def test_derived_sizes() -> None:
    model = ModelConfig(**MODEL, rope_factor=1.51)  # type: ignore[arg-type]
    # 64 positions times 1.51, and five times 64 entries for 300.
    assert (model.head_dim, model.context_len, model.padded_vocab_size) == (8, 96, 320)
    assert ModelConfig(**{**MODEL, "vocab_size": 320}).padded_vocab_size == 320  # type: ignore[arg-type]


def test_defaults_of_training() -> None:
    c = TrainConfig(steps=3, global_batch_size=4, micro_batch_size=2)
    assert (c.stage, c.precision, c.compile, c.seed) == ("base", "fp32", "auto", 0)
    assert (c.eval_every, c.eval_sequences, c.save_every, c.sample_tokens) == (0, 256, 0, 48)
    assert (c.keep_latest_k, c.keep_best, c.save_timeout_s) == (2, True, 600)
    assert not any((c.fp8, c.window_warmup, c.checkpoint_activations, c.deterministic))
    assert c.spike_clip == 0


def test_defaults_of_reinforcement_learning() -> None:
    c = RLConfig()
    assert (c.pool, c.questions, c.samples, c.min_groups, c.max_rounds) == (2000, 24, 16, 8, 4)
    assert (c.max_tokens, c.temperature, c.loss, c.truncation) == (96, 1.0, "reinforce", "wrong")
    assert (c.clip_low, c.clip_high, c.kl, c.stale) == (0.2, 0.2, 0, 0)
    assert (c.curriculum, c.rehearsal, c.max_logprob_diff) == (True, None, None)
    assert (c.eval_questions, c.eval_samples) == (32, 4)
