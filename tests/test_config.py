from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nanochat_ray.cli import entry
from nanochat_ray.config import from_json, to_json
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.model.config import ModelConfig, count_parameters
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import Store
from nanochat_ray.train import recipe
from nanochat_ray.train.config import TrainConfig
from tests.tiny import tiny_config


def test_configurations_survive_json() -> None:
    train = TrainConfig(steps=3, global_batch_size=4, micro_batch_size=2)
    assert from_json(TrainConfig, to_json(train)) == train
    assert from_json(ModelConfig, to_json(tiny_config())) == tiny_config()
    with pytest.raises(ValueError, match="ModelConfig has no field 'depth'"):
        from_json(ModelConfig, {"depth": 3})
    with pytest.raises(ValueError, match="missing"):
        from_json(TrainConfig, {"steps": 3})


def test_old_null_epsilon_is_the_default() -> None:
    old = {**to_json(tiny_config()), "norm_eps": None}
    assert from_json(ModelConfig, old).norm_eps == 2**-23
    with pytest.raises(ValueError, match="n_layer=None is not allowed: int"):
        from_json(ModelConfig, {**old, "n_layer": None})


def test_old_field_names_load_or_name_the_new() -> None:
    old = {"steps": 3, "batch_rows": 4, "micro_rows": 2, "keep": 7, "optim": {"warmup": 0.5}}
    train = from_json(TrainConfig, old)
    assert (train.global_batch_size, train.micro_batch_size, train.keep_latest_k) == (4, 2, 7)
    assert train.optim.warmup_ratio == 0.5
    with pytest.raises(ValueError, match="missing"):
        from_json(TrainConfig, {"steps": 3})
    with pytest.raises(ValueError, match="unknown argument '--take': it is now --import-from"):
        entry.parse(OptimConfig, None, ["--take", "x"])


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: ModelConfig.preset("newest", vocab_size=300), r"preset='newest'.*classic"),
        (lambda: tiny_config(n_kv_head=3), r"n_kv_head=3 .* divisor of n_head=4"),
        (lambda: tiny_config(n_embd=36), r"n_embd=36"),
        (lambda: tiny_config(window_pattern="LX"), r"window_pattern='LX'"),
        (lambda: TrainConfig(steps=0, global_batch_size=1, micro_batch_size=1), "steps=0"),
        (
            lambda: TrainConfig(steps=2.5, global_batch_size=1, micro_batch_size=1),  # type: ignore[arg-type]
            r"steps=2\.5 is not allowed: a whole number from 1",
        ),
        (lambda: EngineConfig(max_num_seqs=True), "max_num_seqs=True is not allowed"),
        (lambda: EngineConfig(kv_tokens=-(10**5000)), "kv_tokens=an int of 16610 bits"),
        (
            lambda: TrainConfig(steps=1, global_batch_size=5, micro_batch_size=2),
            "global_batch_size=5 .*micro_batch_size=2",
        ),
        (
            lambda: EngineConfig(max_num_seqs=32, max_num_batched_tokens=8),
            "max_num_batched_tokens=8",
        ),
        (lambda: recipe.model_config(0, 300), "depth=0"),
        (lambda: Store.at("ftp://host/x"), r"storage='ftp://host/x' is not allowed"),
        (lambda: Store.at(""), "storage='' is not allowed"),
        (lambda: Store.at("s3://key:secret@bucket/x"), "holds credentials"),
    ],
)
def test_what_is_not_allowed_is_named(make, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        make()


SIZES = ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "sequence_len", "pad_vocab_to")


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -4, 4.0, True])
def test_sizes_of_a_model_are_whole_numbers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} is not allowed: a whole number from 1"):
        tiny_config(**{name: value})


OPTIONS = [f.name for f in dataclasses.fields(ModelConfig) if f.default is False]


@pytest.mark.parametrize("option", ["", *OPTIONS])
@pytest.mark.parametrize("preset", ["modern", "classic"])
@pytest.mark.parametrize("depth", [1, 2, 5])
def test_parameters_are_counted_right(preset: str, depth: int, option: str) -> None:
    config = recipe.model_config(depth, 1000, preset=preset, sequence_len=256)
    config = dataclasses.replace(config, **({option: True} if option else {}))
    with torch.device("meta"):
        model = GPT(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())


def test_the_dial_gives_sensible_runs() -> None:
    before = 0
    for depth in range(1, 27):
        model = recipe.model_config(depth, 32768)
        plan = recipe.base_plan(model, workers=2)
        size = plan.train.global_batch_size * model.sequence_len
        assert plan.tokens > before
        assert plan.train.global_batch_size % (2 * plan.train.micro_batch_size) == 0
        assert 2**11 <= size <= 2**21
        assert 100 < plan.train.steps < 200_000
        before = plan.tokens
