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
    assert plan.render(result).count("\n") == 6


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


def test_the_plan_names_options() -> None:
    model = recipe.model_config(4, VOCABULARY, skips=True, backout=False)
    train = recipe.base_plan(model).train
    optim = dataclasses.replace(train.optim, orthogonalizer="newton_schulz")
    train = dataclasses.replace(train, optim=optim)
    text = plan.render(plan.describe(model, train, workers=1, hardware=by_name("cpu")))
    assert "\noptions   no backout, skips, orthogonalizer newton_schulz\n" in text


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


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("not known", plan.hours(None)),
        ("30.0 minutes", plan.hours(0.5)),
        ("1.0 hours", plan.hours(1)),
        ("71.9 hours", plan.hours(71.9)),
        ("3.0 days", plan.hours(72)),
        ("999.9 M", plan.millions(999_900_000)),
        ("1.00 G", plan.millions(10**9)),
        ("9.99", plan.gib(9.99 * 2**30)),
        ("10", plan.gib(10 * 2**30)),
    ],
)
def test_figures_have_units(text: str, value: str) -> None:
    assert value == text


def test_the_text_of_a_plan_by_hand() -> None:
    model = recipe.model_config(4, VOCABULARY)
    train = recipe.base_plan(model, tokens=2**22, batch=2**14, workers=2, precision="fp32").train
    values = plan.describe(model, train, workers=2, hardware=by_name("cpu"), num_sequences=4096)
    assert (values["steps"], values["tokens"], values["batch"]["tokens"]) == (256, 2**22, 2**14)
    assert values["data"] == {"sequences": 4096, "passes": 2.0}
    # 32 sequences of 512 tokens, 16 of them for each worker; a micro-batch is all of these.
    assert values["batch"]["gradient_accumulation"] == 1
    parameters = 12 * 4 * 256**2 + 2 * 12 * 4  # and the gates of two layers
    head = VOCABULARY * 256
    assert values["parameters"]["matrices"] == parameters
    assert values["tokens_per_parameter"] == 2**22 / (parameters + head)
    flops = (6 * (parameters + head) + 12 * 256 * 4 * 512) * 2**22
    assert values["flops"] == flops
    assert values["hours"] == pytest.approx(flops / (2 * 1.7e11 * 0.1) / 3600)
    lines = plan.render(values).splitlines()
    assert lines[0] == (
        "model     4 layers, 256 wide, 4 heads, vocabulary 32,768, context 512: 36.7 M parameters "
        "(3.1 M blocks, 8.4 M embedding, 16.8 M value embeddings, 8.4 M head)"
    )
    assert lines[1] == (
        "training  256 steps of 16,384 tokens, together 4.2 M (0.4 a parameter of blocks and "
        f"head), {flops:.2e} FLOPs in fp32"
    )
    assert lines[2] == (
        "batch     32 sequences: 2 workers, micro-batches of 16, 1 gradient accumulation steps"
    )
    assert lines[3] == "data      4,096 sequences, 2.00 passes"
    assert lines[4] == "options   no backout"
    # For a tenth of the 2,500 steps the rates rise by (256 / 2500)^-0.3 = 1.981.
    assert lines[5] == (
        "lr        matrix 0.03962, embedding 1.029, unembedding 0.01386, scalar 0.1274; weight "
        "decay 0.2"
    )
    assert lines[6].startswith(f"memory    {values['memory']['total'] / 2**30:.2f} GiB on each")
    assert lines[6].endswith(f"checkpoint {values['memory']['checkpoint'] / 2**30:.2f}")
    assert lines[7] == (
        f"time      {values['hours']:.1f} hours on 2 × cpu, at 10% of 0.17 TFLOP/s each (assumed "
        "share of the peak in fp32; torch 2.13 matmul of 1,024³, one thread of a Xeon with AMX, "
        "measured)"
    )
    assert len(lines) == 8


def test_a_measured_rate_gives_the_hours() -> None:
    model = recipe.model_config(4, VOCABULARY)
    train = recipe.base_plan(model, tokens=2**22, batch=2**14).train
    values = plan.describe(model, train, workers=1, hardware=by_name("cpu"), tokens_per_s=1024.0)
    assert values["hours"] == pytest.approx(4096 / 3600)
    assert values["data"] == {"sequences": 0, "passes": 0}
    lines = plan.render(values).splitlines()
    assert lines[-1] == (
        "time      1.1 hours on 1 × cpu, at 1,024 tokens/s of all workers (measured)"
    )
    assert not any(line.startswith("data") for line in lines)
    gpu = plan.describe(model, train, workers=1, hardware=by_name("l4"))
    assert " of 22 GiB on each worker" in plan.render(gpu)
    assert "at 40% of 121 TFLOP/s each (assumed share of the peak in bf16;" in plan.render(gpu)
