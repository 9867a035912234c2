"""Matmuls with bf16 and int8 weights in C: values, and bits that depend on one row alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat_ray.engine.config import EngineConfig, EnginePrecision, Kernels
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kernels import available
from nanochat_ray.engine.kvcache.slot_cache import SlotCache
from nanochat_ray.engine.native import FLOAT_EPS, Native
from nanochat_ray.engine.packed_linear import PackedLinear, make_packed_linears, quantize
from nanochat_ray.model.gpt import GPT
from tests.engine.engine_kit import (
    VOCAB,
    answer,
    ask,
    finish,
    make_engine,
    make_model,
    needs_compiler,
    tokens,
)
from tests.engine.test_native import load_level, threads

pytestmark = needs_compiler
LEVELS = available()
DTYPES = [torch.bfloat16, torch.int8]
PRECISIONS = ["bf16", "int8"]
SHAPES = [(1, 1), (6, 12), (64, 33), (33, 100), (96, 1101), (40, 384)]
"""Outputs and inputs: odd ones, and fewer than a panel or a block."""


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> Native:
    return load_level(64, 1, request.param)


def linear_of(kernels: Native, weight: Tensor, dtype: torch.dtype) -> PackedLinear:
    (layer,) = make_packed_linears(kernels, [(weight.size(0), weight.size(1))], dtype)
    layer.load(weight)
    return layer


def random_pair(shape: tuple[int, int], rows: int) -> tuple[Tensor, Tensor]:
    """A weight and inputs, with magnitudes that differ by 2^12."""
    noise = torch.Generator().manual_seed(shape[1])
    scale = 2.0 ** torch.randint(-6, 7, (rows, shape[1]), generator=noise)
    weight = torch.randn(shape, generator=noise)
    return weight, scale * torch.randn((rows, shape[1]), generator=noise)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_sums_have_float32_precision(kernels: Native, shape: tuple[int, int]) -> None:
    """Products of bfloat16 are exact in float32: √n·eps of Σ|x·w| bounds the rounding of n sums."""
    weight, x = random_pair(shape, 70)
    w64, x64 = weight.bfloat16().double(), x.bfloat16().double()
    bound = max(2, shape[1] ** 0.5) * FLOAT_EPS * (x64.abs() @ w64.abs().T)
    error = linear_of(kernels, weight, torch.bfloat16)(x) - x64 @ w64.T
    assert (error.abs() <= bound).all()


def blocks_of(x: Tensor) -> Tensor:
    """``[rows, K]`` → ``[rows, B, 32]``, padded with 0."""
    return torch.nn.functional.pad(x, (0, -x.size(1) % 32)).unflatten(1, (-1, 32))


def test_quantize_by_hand() -> None:
    weight = torch.zeros(2, 33)
    weight[0, :4] = torch.tensor([127.0, -127.0, 0.49, 0.51]) / 4
    weight[1, 32] = -3e-5
    numbers, scales = quantize(weight)
    assert (numbers.shape, scales.shape) == ((2, 2, 32), (2, 2, 1))
    assert (scales.dtype, scales[0, 0].item()) == (torch.bfloat16, 0.25)
    assert numbers[0, 0, :4].tolist() == [127, -127, 0, 1]
    assert numbers[1, 1, 0] == -127 or numbers[1, 1, 0] == -126  # the scale was rounded up
    assert scales[0, 1] == scales[1, 0] == 0
    assert not numbers[0, 1].any()


def test_quantized_weights_are_within_half_a_step() -> None:
    weight, _ = random_pair((50, 100), 1)
    numbers, scales = quantize(weight)
    exact = blocks_of(weight).double()
    error = (numbers * scales.double() - exact).abs()
    largest = exact.abs().amax(dim=2, keepdim=True)
    assert (scales.double() >= largest / 127).all()
    assert (scales.double() <= largest / 127 * (1 + 2**-7)).all()
    assert (error <= 0.5000001 * scales.double()).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_sums_have_float32_precision(kernels: Native, shape: tuple[int, int]) -> None:
    """Inputs that quantize without an error: sums of a block are exact then, and B blocks add up
    with at most some B·eps of Σ|x·w|."""
    weight, x = random_pair(shape, 70)
    numbers, scales = quantize(weight)
    inputs = blocks_of(x.sign() * (blocks_of(x).flatten(1)[:, : shape[1]].abs() * 9 % 127).round())
    inputs[..., 0] = 127
    inputs *= 2.0 ** torch.arange(-3, 4).repeat(10)[:, None, None]  # of each row
    x = inputs.flatten(1)[:, : shape[1]].contiguous()
    w64 = (numbers * scales.double()).flatten(1)[:, : shape[1]]
    count = scales.size(1) + 3
    bound = count * FLOAT_EPS * (x.double().abs() @ w64.abs().T)
    error = linear_of(kernels, weight, torch.int8)(x) - x.double() @ w64.T
    assert (error.abs() <= bound).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_inputs_are_within_half_a_step(kernels: Native, shape: tuple[int, int]) -> None:
    weight, x = random_pair(shape, 70)
    numbers, scales = quantize(weight)
    w64 = (numbers * scales.double()).flatten(1)[:, : shape[1]]
    steps = (blocks_of(x).abs().amax(dim=2, keepdim=True) / 127).expand(-1, -1, 32).flatten(1)
    bound = 0.50001 * steps[:, : shape[1]].double() @ w64.abs().T
    error = linear_of(kernels, weight, torch.int8)(x) - x.double() @ w64.T
    assert (error.abs() <= bound).all()
    assert shape[1] < 30 or (error.abs() > bound / 100).any()


@pytest.mark.parametrize("level", LEVELS)
def test_int8_levels_agree(level: str) -> None:
    """Sums of blocks are exact: levels differ by the rounding of one sum over blocks."""
    weight, x = random_pair((64, 320), 20)
    reference = linear_of(load_level(64, 1, "generic"), weight, torch.int8)(x)
    result = linear_of(load_level(64, 1, level), weight, torch.int8)(x)
    size = x.abs().amax() * weight.abs().sum(dim=1)
    assert ((result - reference).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_bitwise_independent(
    kernels: Native, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, x = random_pair(shape, 300)
    linear = linear_of(kernels, weight, dtype)
    result = linear(x)
    for rows in (*range(1, 71), 127, 128, 129, 160, 255, 256, 257):
        assert torch.equal(linear(x[-rows:]), result[-rows:]), rows
    for count in (2, 3):
        with threads(count):
            assert torch.equal(linear(x), result)
            assert torch.equal(linear(x[:5]), result[:5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_spreads_in_its_row_alone(kernels: Native, dtype: torch.dtype) -> None:
    weight, x = random_pair((40, 100), 9)
    linear = linear_of(kernels, weight, dtype)
    result = linear(x)
    for row, value in ((3, torch.nan), (4, torch.inf)):
        x[row, 55] = value
    after = linear(x)
    assert after[3].isnan().all()
    assert not after[4].isfinite().any()
    others = [0, 1, 2, 5, 6, 7, 8]
    assert torch.equal(after[others], result[others])


def test_bf16_rounds_ties_to_even(kernels: Native) -> None:
    identity = linear_of(kernels, torch.eye(4), torch.bfloat16)
    step = 2.0**-7  # of bfloat16 numbers from 1 to 2
    x = torch.tensor([[1 + step / 2, 1 + 1.5 * step, 1 + 0.51 * step, -3e38]])
    assert identity(x).tolist() == [[1.0, 1 + 2 * step, 1 + step, x[0, 3].bfloat16().item()]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_loading_packs_into_the_same_memory(kernels: Native, dtype: torch.dtype) -> None:
    first, x = random_pair((50, 70), 3)
    second = first.flip(0) * 3
    linear = linear_of(kernels, first, dtype)
    address = linear.weight.data_ptr()
    linear.load(second.double())
    assert linear.weight.data_ptr() == address
    assert torch.equal(linear.weight, linear_of(kernels, second, dtype).weight)
    assert not torch.equal(linear(x), linear_of(kernels, first, dtype)(x))


def nbytes(model: GPT, precision: str) -> int:
    inference = make_engine(model, precision=precision).runner.model
    matmuls = [layer.weight for layer in inference.linears.values()]
    return sum(t.nbytes for t in (*matmuls, *inference.tensors.values()))


@pytest.mark.parametrize(("precision", "ratio"), [("bf16", 0.5), ("int8", 0.31)])
def test_weights_take_less_memory(precision: str, ratio: float) -> None:
    model = make_model("modern")
    assert nbytes(model, precision) == pytest.approx(ratio * nbytes(model, "fp32"), rel=0.02)


def workload(count: int) -> list[Any]:
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))] for _ in range(count)]
    return [
        ask(str(i), prompt, max_tokens=12, temperature=0.8, seed=i, logprobs=0)
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("preset", ["modern", "classic"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_answers_do_not_depend_on_the_batch(precision: str, preset: str, level: str) -> None:
    """Tokens and log-probabilities, bitwise: alone, beside others, in chunks, with draft tokens."""
    model, requests = make_model(preset), workload(6)
    load_level(16, 2, level)
    results = []
    for settings in (
        {"max_num_seqs": 1, "prefix_cache_tokens": 0, "num_speculative_tokens": 0},
        {"max_num_seqs": 6, "max_num_batched_tokens": 256},
        {"max_num_seqs": 3, "max_num_batched_tokens": 5, "prefill_chunk": 2},
    ):
        engine = make_engine(model, precision=precision, kernels=level, **settings)
        assert engine.stats().kernels != "torch"
        for request in requests:
            engine.add(request)
        results.append(
            {
                name: (tokens(outputs), [p for o in outputs for p in o.logprobs or ()])
                for name, outputs in finish(engine).items()
            }
        )
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 2.0**-7), ("int8", 2.0**-5)])
@pytest.mark.parametrize("preset", ["modern", "classic"])
def test_logprobs_are_near_fp32(preset: str, precision: str, bound: float) -> None:
    """The mean difference, relative to the spread of log-probabilities over tokens."""
    prompt = [(7 * i * i + i) % VOCAB for i in range(100)]
    values = []
    for name in ("fp32", precision):
        engine = make_engine(make_model(preset), precision=name)
        engine.add(ask("a", prompt, max_tokens=1, prompt_logprobs=0))
        (output, *_) = finish(engine)["a"]
        values.append(torch.tensor([p.logprob for p in output.prompt_logprobs or () if p]))
    exact, rough = values
    assert not torch.equal(exact, rough)
    assert (exact - rough).abs().mean() < bound * exact.std()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_without_c_answers_do_not_depend_on_the_batch(precision: str) -> None:
    model, requests = make_model("modern"), workload(6)
    settings = {"precision": precision, "kernels": "torch"}
    alone = {r.id: answer(make_engine(model, max_num_seqs=1, **settings), r) for r in requests}
    together = make_engine(model, max_num_seqs=6, max_num_batched_tokens=256, **settings)
    for request in requests:
        together.add(request)
    results = {k: tokens(v) for k, v in finish(together).items()}
    assert sum(results[k] != alone[k] for k in alone) <= 1  # torch's order of sums is the CPU's


@pytest.mark.parametrize(
    ("precision", "kernels", "dtype"),
    [
        ("fp32", "auto", torch.float32),
        ("bf16", "auto", torch.bfloat16),
        ("int8", "auto", torch.bfloat16),
        ("int8", "torch", torch.float32),
    ],
)
def test_keys_are_bf16_with_small_weights(
    precision: EnginePrecision, kernels: Kernels, dtype: torch.dtype
) -> None:
    config = EngineConfig(precision=precision, kernels=kernels)
    cache = Engine(make_model("classic"), config).runner.cache
    assert isinstance(cache, SlotCache)
    assert cache.keys.dtype == cache.values.dtype == dtype


def test_int8_is_for_cpus() -> None:
    with pytest.raises(ValueError, match="precision='int8' is not allowed: fp32 or bf16 on meta"):
        Engine(make_model("classic"), EngineConfig(precision="int8"), device="meta")
