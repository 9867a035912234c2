"""Matmuls with bf16 weights in C: values, and that a row's bits depend on that row alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from nanochat_ray.engine.kernels import available
from nanochat_ray.engine.native import FLOAT_EPS, Native
from nanochat_ray.engine.packed_linear import PackedLinear
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
DTYPES = [torch.bfloat16]
PRECISIONS = ["bf16"]
SHAPES = [(1, 1), (6, 12), (64, 33), (33, 100), (96, 1101), (40, 384)]
"""Outputs and inputs: odd ones, and fewer than a panel or a block."""


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> Native:
    return load_level(64, 1, request.param)


def linear_of(kernels: Native, weight: Tensor, dtype: torch.dtype) -> PackedLinear:
    layer = PackedLinear(kernels, (weight.size(0), weight.size(1)), dtype)
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_bitwise_independent(
    kernels: Native, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, x = random_pair(shape, 300)
    linear = linear_of(kernels, weight, dtype)
    result = linear(x)
    for rows in (*range(1, 71), 127, 128, 129, 160, 257):
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


@pytest.mark.parametrize(("precision", "ratio"), [("bf16", 0.5)])
def test_weights_take_less_memory(precision: str, ratio: float) -> None:
    model = make_model("modern")
    assert nbytes(model, precision) == pytest.approx(ratio * nbytes(model, "fp32"), rel=0.001)


def workload(count: int) -> list[Any]:
    rng = random.Random(5)
    prompts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 60))] for _ in range(count)]
    return [
        ask(str(i), prompt, max_tokens=12, temperature=0.8, seed=i, logprobs=0)
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("preset", ["modern", "classic"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_answers_do_not_depend_on_the_batch(precision: str, preset: str, level: str) -> None:
    """Tokens and log-probabilities, bitwise: alone, beside others, in chunks, with draft tokens."""
    model, requests = make_model(preset), workload(10)
    load_level(16, 2, level)
    results = []
    for settings in (
        {"max_num_seqs": 1, "prefix_cache_tokens": 0, "num_speculative_tokens": 0},
        {"max_num_seqs": 10, "max_num_batched_tokens": 256},
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


@pytest.mark.parametrize(("precision", "bound"), [("bf16", 2.0**-7)])
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
