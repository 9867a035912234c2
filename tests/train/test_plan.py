"""The plan of every depth against a table that was derived by hand, and published models."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from nanochat_ray.model.config import count_parameters
from nanochat_ray.train import memory, plan, recipe
from nanochat_ray.train.hardware import HARDWARE, by_name

VOCABULARY = 32_768
# Width 64 a layer; blocks 12·n·w², head and embedding 32,768·w, a table as large again for every
# other layer; 12 tokens for each parameter of blocks and head; nanochat's depth 12 with 2^19
# tokens a batch as the anchor. Columns: width, heads, millions of parameters in blocks, in all;
# millions of tokens; batch in 2^n tokens, from and to; steps from and to.
TABLE = {
    2: (128, 2, 0.39, 12.98, 55.1, (15, 17), (400, 1_700)),
    4: (256, 4, 3.15, 36.7, 138.4, (16, 18), (500, 2_200)),
    6: (384, 6, 10.6, 73.5, 278.4, (17, 19), (500, 2_200)),
    8: (512, 8, 25.2, 125.8, 503.3, (17, 19), (900, 3_900)),
    12: (768, 6, 84.9, 286.3, 1_321, (19, 19), (2_500, 2_540)),
    16: (1024, 8, 201.3, 536.9, 2_818, (19, 20), (2_600, 5_400)),
    20: (1280, 10, 393.2, 896.5, 5_222, (19, 20), (4_900, 10_000)),
    24: (1536, 12, 679.5, 1_384, 8_758, (20, 21), (4_100, 8_400)),
    26: (1664, 13, 863.9, 1_682, 11_021, (20, 21), (5_200, 10_600)),
}


@pytest.mark.parametrize("depth", TABLE)
def test_the_plan_of_a_depth_is_the_tables(depth: int) -> None:
    width, heads, blocks, total, tokens, batches, steps = TABLE[depth]
    model = recipe.model_config(depth, VOCABULARY)
    train = recipe.base_plan(model, workers=8).train
    result = plan.describe(model, train, workers=8, hardware=by_name("h100"))
    assert (result["width"], result["heads"]) == (width, heads)
    assert result["parameters"]["matrices"] / 1e6 == pytest.approx(blocks, rel=0.01)
    assert result["parameters"]["total"] / 1e6 == pytest.approx(total, rel=0.01)
    assert result["tokens"] / 1e6 == pytest.approx(tokens, rel=0.01)
    assert batches[0] <= math.log2(result["batch"]["tokens"]) <= batches[1]
    assert steps[0] <= result["steps"] <= steps[1]
    batch = result["batch"]
    steps = batch["gradient_accumulation"]
    assert batch["global_batch_size"] == 8 * batch["micro_batch_size"] * steps
    # Every weight exists as a weight and a gradient in float32, and no plan here needs more than
    # the GPU of the table has.
    assert 8e6 * total < result["memory"]["total"] < 80e9
    # PaLM's count is 6 a parameter and token, and attention adds less than as much again.
    dense = 6 * (result["parameters"]["matrices"] + result["parameters"]["head"]) * result["tokens"]
    assert dense < result["flops"] < 2.5 * dense
    assert result["hours"] == pytest.approx(result["flops"] / (8 * 0.4 * 989e12) / 3600)
    rates = result["learning_rates"]
    assert 0.01 < rates["matrix_lr"] < 0.06
    assert 0.1 < rates["embedding_lr"] < 2
    assert json.loads(json.dumps(result)) == result
    assert plan.render(result).count("\n") == 5


@pytest.mark.parametrize(("depth", "millions"), [(20, 561), (26, 1_082), (32, 1_879)])
def test_classic_models_have_published_sizes(depth: int, millions: float) -> None:
    # nanochat, October 2025: depth 20 has 561 M parameters, depth 32 has 1.9 G (vocabulary 2^16).
    model = recipe.model_config(depth, 2**16, preset="classic")
    assert count_parameters(model).total / 1e6 == pytest.approx(millions, rel=0.005)


def test_plan_predicts_published_speedruns() -> None:
    # nanochat, October 2025: depth 20, 11.2 G tokens, about 3 hours on 8 H100; 4e19 FLOPs.
    model = recipe.model_config(20, 2**16, preset="classic", window_pattern="L")
    train = recipe.base_plan(model, tokens=11_200_000_000, batch=2**19, workers=8).train
    result = plan.describe(model, train, workers=8, hardware=by_name("h100"))
    assert result["flops"] == pytest.approx(4e19, rel=0.1)
    assert 2.5 < result["hours"] < 4.5


def test_depth_lowers_rates_workers_time() -> None:
    result = []
    for depth in TABLE:
        model = recipe.model_config(depth, VOCABULARY)
        train = recipe.base_plan(model, workers=8).train
        result.append(plan.describe(model, train, workers=8, hardware=by_name("h200")))
    hours = [f["hours"] for f in result]
    assert hours == sorted(hours)
    sizes = [f["memory"]["total"] for f in result]
    assert sizes == sorted(sizes)
    embedding = [f["learning_rates"]["embedding_lr"] for f in result]
    assert embedding[0] > embedding[-1]


def test_batch_does_not_depend_on_workers() -> None:
    model = recipe.model_config(8, VOCABULARY)
    result = {recipe.base_plan(model, workers=n).train.global_batch_size for n in (1, 2, 3, 7, 8)}
    assert len(result) == 1


def test_micro_batch_fills_the_gpus_memory() -> None:
    model = recipe.model_config(26, VOCABULARY)
    train = recipe.base_plan(model, workers=8).train
    sizes = {}
    for name in ("l4", "a100", "b200", "cpu"):
        larger = plan.fit_micro_batch(model, train, workers=8, hardware=HARDWARE[name])
        sizes[name] = larger.micro_batch_size
        if name in ("a100", "b200"):
            required_memory = memory.estimate(model, larger, world=8, on_gpu=True)
            assert required_memory.total < HARDWARE[name].memory
    assert sizes["l4"] <= sizes["a100"] < sizes["b200"]
    assert sizes["cpu"] == train.micro_batch_size


def test_micro_batch_shrinks_to_fit() -> None:
    model = recipe.model_config(20, VOCABULARY)
    train = recipe.base_plan(model, micro_batch_size=32).train
    hardware = dataclasses.replace(HARDWARE["a100"], memory=24 << 30)
    smaller = plan.fit_micro_batch(model, train, workers=1, hardware=hardware)
    assert smaller.micro_batch_size < train.micro_batch_size
    required_memory = memory.estimate(model, smaller, world=1, on_gpu=True)
    assert required_memory.total <= 0.8 * hardware.memory
    # What fits nowhere gets one sequence, and is refused later.
    tiny = dataclasses.replace(hardware, memory=1 << 30)
    assert plan.fit_micro_batch(model, train, workers=1, hardware=tiny).micro_batch_size == 1


def test_unknown_hardware_is_refused() -> None:
    with pytest.raises(ValueError, match=r"hardware='h999' is not allowed: one of .*h100"):
        by_name("h999")


@pytest.mark.parametrize(("num_sequences", "many"), [(0, False), (10**7, False), (2, True)])
def test_the_plan_tells_passes_over_the_data(num_sequences: int, many: bool) -> None:
    model = recipe.model_config(4, VOCABULARY)
    train = recipe.base_plan(model, workers=1).train
    description = plan.describe(
        model, train, workers=1, hardware=by_name("cpu"), num_sequences=num_sequences
    )
    num_trained = train.steps * train.global_batch_size
    assert description["data"]["passes"] == (num_trained / num_sequences if num_sequences else 0)
    text = plan.render(description)
    assert (f"{num_sequences:,} sequences, " in text) == bool(num_sequences)
    passes = num_trained / max(num_sequences, 1)
    warning = f"WARNING: training passes {passes:,.0f} times over {num_sequences:,} sequences"
    assert (warning in text) == many
