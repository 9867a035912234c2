"""What is in C against torch's, and that a row's bits are its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.engine.kernels import available, load_kernels
from nanochat_ray.engine.native import FLOAT_EPS, Native
from nanochat_ray.engine.operators import TorchOperators
from nanochat_ray.engine.packed_linear import PackedLinear, make_packed_linears
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.sequence import Sequence
from nanochat_ray.model.fused import relu_squared, rms_norm
from nanochat_ray.model.rotary import rotary_tables
from tests.engine.engine_kit import VOCAB, answer, ask, make_engine, make_model, needs_compiler

SLOTS, LENGTH = 5, 400
Step = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_level(head_dim: int, group: int, level: str = "auto") -> Native:
    kernels = load_kernels(head_dim, group, level)
    if kernels is None and level != "auto":
        pytest.skip(f"this compiler does not know {level}")
    assert kernels is not None
    return kernels


def run_attention(of: Step, window: int, level: str = "auto") -> Tensor:
    q, _, _, keys, _, positions = of
    native = load_level(q.size(2), q.size(1) // keys.size(1), level)
    return native.attention(*of, native.tile_starts(*positions.numpy()), window)


def step(head_dim: int, group: int, slots: list[int], positions: list[int], heads: int = 2) -> Step:
    noise = torch.Generator().manual_seed(head_dim + group)
    n = len(slots)
    # As they come from one product of all three: rows with the others' values between.
    whole = torch.randn((n, heads * (group + 2), head_dim), generator=noise)
    q, k, v = whole.split([heads * group, heads, heads], dim=1)
    keys, values = torch.randn((2, SLOTS, heads, LENGTH, head_dim), generator=noise)
    return q, k, v, keys, values, torch.tensor([slots, positions])


def reference_attention(of: Step, window: int) -> Tensor:
    """The definition: each row over the keys that it sees, once all are written."""
    q, k, v, keys, values, (slots, positions) = of
    keys, values = keys.clone(), values.clone()
    keys[slots, :, positions], values[slots, :, positions] = k, v
    rows = []
    for row, slot, last in zip(q, slots.tolist(), positions.tolist(), strict=True):
        visible = slice(max(0, last - window) if window >= 0 else 0, last + 1)
        y = F.scaled_dot_product_attention(
            row[:, None], keys[slot, :, visible], values[slot, :, visible], enable_gqa=True
        )
        rows.append(y[:, 0])
    return torch.stack(rows)


LEVELS = available()
pytestmark = needs_compiler
SIZES = [(16, 1), (48, 3), (64, 1), (64, 4), (128, 2), (16, 12)]
COMMON_SIZES = [(16, 2), (64, 1), (128, 2)]
"""Of the other levels: each size of each level is compiled, and other tests share these."""


@pytest.mark.parametrize("window", [-1, 0, 70])
@pytest.mark.parametrize(("head_dim", "group"), SIZES)
def test_attention_equals_its_definition(head_dim: int, group: int, window: int) -> None:
    # Slots in any order, a sequence with draft tokens, and lengths about the borders of blocks.
    of = step(head_dim, group, [3, 0, 0, 0, 4, 1], [0, 62, 63, 64, 127, 399])
    want, result = reference_attention(of, window), run_attention(of, window, LEVELS[0])
    torch.testing.assert_close(result, want, rtol=2e-5, atol=2e-6)
    _, k, v, keys, values, (slots, positions) = of
    assert torch.equal(keys[slots, :, positions], k)
    assert torch.equal(values[slots, :, positions], v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [-1, 0, 70])
@pytest.mark.parametrize(
    ("head_dim", "group", "level"),
    [(*size, LEVELS[0]) for size in SIZES]
    + [(*size, level) for size in COMMON_SIZES for level in LEVELS[1:]],
)
def test_prompt_chunks_are_bitwise_equal(
    head_dim: int, group: int, level: str, window: int, dtype: torch.dtype
) -> None:
    n = 150
    q, k, v, keys, values, positions = step(head_dim, group, [2] * n, list(range(n)))
    k, v, keys, values = (x.to(dtype).float() for x in (k, v, keys, values))
    want = reference_attention((q, k, v, keys, values, positions), window)
    keys, values = keys.to(dtype), values.to(dtype)
    whole = run_attention((q, k, v, keys, values, positions), window, level)
    torch.testing.assert_close(whole, want, rtol=2e-5, atol=2e-6)
    for size in (1, 2, 7, 64):
        keys[2], values[2] = torch.nan, torch.nan  # who is not yet written is not read
        for first in range(0, n, size):
            part = slice(first, first + size)
            of = (q[part], k[part], v[part], keys, values, positions[:, part])
            assert torch.equal(run_attention(of, window, level), whole[part]), (size, first)


@pytest.mark.parametrize(
    ("head_dim", "group", "level"),
    [(*size, LEVELS[0]) for size in SIZES] + [(64, 1, level) for level in LEVELS[1:]],
)
def test_bf16_keys_are_rounded_float32_keys(head_dim: int, group: int, level: str) -> None:
    """Bitwise the results over float32 keys and values that were rounded before."""
    prompts = step(head_dim, group, [0] * 150 + [3] * 70, [*range(150), *range(70)])
    decodes = step(head_dim, group, [3, 0, 0, 0, 0], [70, 62, 64, 127, 150])
    exact = torch.zeros_like(prompts[3]), torch.zeros_like(prompts[4])
    short = exact[0].bfloat16(), exact[1].bfloat16()
    for window in (-1, 0, 70):
        for q, k, v, _, _, where in (prompts, decodes):
            k16, v16 = k.bfloat16().float(), v.bfloat16().float()
            want = run_attention((q, k16, v16, *exact, where), window, level)
            result = run_attention((q, k, v, *short, where), window, level)
            assert torch.equal(result, want), window


def test_large_scores_do_not_overflow() -> None:
    q, k, v, keys, values, positions = step(64, 1, [0, 1, 1], [350, 90, 91])
    of = (100 * q, 100 * k, v, keys, values, positions)
    torch.testing.assert_close(
        run_attention(of, -1), reference_attention(of, -1), rtol=1e-4, atol=1e-4
    )


def test_rows_are_bitwise_independent() -> None:
    of = step(64, 2, [0, 1, 2, 4, 4], [10, 399, 128, 200, 201])
    q, k, v, keys, values, positions = of
    together = run_attention(of, 150)
    with threads(3):
        assert torch.equal(run_attention(of, 150), together)
    for row in range(5):
        slot, position = positions[:, row].tolist()
        keys[3], values[3] = keys[slot], values[slot]
        one, position = slice(row, row + 1), torch.tensor([[3], [position]])
        alone = run_attention((q[one], k[one], v[one], keys, values, position), 150)
        assert torch.equal(alone[0], together[row])


def test_only_new_positions_are_written() -> None:
    of = step(16, 1, [2, 3, 3], [5, 0, 1])
    before = of[3].clone()
    run_attention(of, -1)
    positions_written = (of[3] != before).any(dim=-1).any(dim=1).nonzero().tolist()
    assert positions_written == [[2, 5], [3, 0], [3, 1]]


def test_tile_starts() -> None:
    slots = [4, 4, 4, 1, 0, 0] + [7] * 19
    positions = [9, 10, 11, 12, 3, 5, *range(40, 59)]
    tiles = load_level(64, 1).tile_starts(np.array(slots), np.array(positions))
    assert tiles.tolist() == [0, 3, 4, 5, 6, 14, 22, 25]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("eps", [2**-23, 1e-6])
def test_rotary_qk_norm(eps: float, level: str) -> None:
    noise = torch.Generator().manual_seed(3)
    whole = torch.randn((9, 7, 64), generator=noise)
    cos, sin = (t[5:14] for t in rotary_tables(20, 64, 10_000.0))
    want = TorchOperators().rotary_qk_norm(whole[:, :5], cos, sin, eps)
    rest = whole[:, 5:].clone()
    result = load_level(64, 1, level).rotary_qk_norm(whole[:, :5], cos, sin, eps)
    torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-6)
    assert torch.equal(whole[:, 5:], rest)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(1, 384), (40, 100), (14, 9)])
def test_rms_norm(shape: tuple[int, ...], level: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    native = load_level(64, 1, level)
    result = native.rms_norm(x, 1e-6)
    torch.testing.assert_close(result, rms_norm(x, 1e-6), rtol=1e-6, atol=1e-6)
    assert torch.equal(native.rms_norm(x[:1], 1e-6), result[:1])


def packed_linear(kernels: Native, weight: Tensor) -> PackedLinear:
    (layer,) = make_packed_linears(kernels, [(weight.size(0), weight.size(1))], torch.float32)
    layer.load(weight)
    return layer


@pytest.fixture(params=LEVELS)
def kernels(request: pytest.FixtureRequest) -> Native:
    return load_level(64, 1, request.param)


@pytest.mark.parametrize(
    ("inputs", "outputs"), [(384, 1152), (300, 96), (64, 33), (12, 6), (1, 1), (1100, 64)]
)
def test_packed_linear(kernels: Native, inputs: int, outputs: int) -> None:
    noise = torch.Generator().manual_seed(7)
    weight = torch.randn((outputs, inputs), generator=noise)
    x = torch.randn((150, inputs), generator=noise)
    linear = packed_linear(kernels, weight)
    result = linear(x)
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert ((result - exact).abs() <= inputs * torch.finfo(torch.float32).eps * size).all()
    for rows in (*range(1, 50), 127, 128, 129, 149):  # tiles of every height, and behind others
        assert torch.equal(linear(x[-rows:]), result[-rows:]), rows
    for count in (2, 3, 9):  # also more than there are blocks of outputs
        with threads(count):
            assert torch.equal(linear(x), result)
            assert torch.equal(linear(x[:5]), result[:5])


def test_matmuls_are_as_exact_as_float32(kernels: Native) -> None:
    """The rounding errors of n sums in float32, seen as independent, add up to at most some √n·eps
    of Σ|x·w| (Higham and Mary, 2019), and to n·eps in any case. Two bfloat16 for each number
    instead of three, or one product less, would be above."""
    n, noise = 500, torch.Generator().manual_seed(8)
    scale = 2.0 ** torch.randint(-20, 21, (40, n), generator=noise)
    weight = torch.randn((64, n), generator=noise)
    x = torch.randn((40, n), generator=noise) * scale
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    error = (packed_linear(kernels, weight)(x) - exact).abs() / size
    assert error.max() < n**0.5 * FLOAT_EPS
    assert error.mean() < 2 * FLOAT_EPS
    large, small = torch.tensor([[3e38, 0.0]]), torch.tensor([[0.0, 1e-30]])
    for row in (large, small):
        one = packed_linear(kernels, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))(row)
        torch.testing.assert_close(one, row, rtol=1e-6, atol=0)
    assert packed_linear(kernels, weight)(torch.full((1, 500), torch.nan)).isnan().all()


def test_relu_squared() -> None:
    x = torch.randn((33, 7), generator=torch.Generator().manual_seed(4))
    want = relu_squared(x)
    assert torch.equal(load_level(64, 1).relu_squared(x.clone()), want)
    assert load_level(64, 1).relu_squared(torch.tensor([[-1.0, torch.nan]]))[0, 0] == 0.0


@pytest.mark.parametrize("level", LEVELS)
def test_softcap(level: str) -> None:
    native = load_level(64, 1, level)
    x = torch.tensor([[0.0, -0.0, 1e-4, -3.0, 14.9, 40.0, -1e4, 1e30, torch.inf, -torch.inf]])
    want = 15 * torch.tanh(x / 15)
    result = native.softcap(x.clone(), 15.0)
    torch.testing.assert_close(result, want, rtol=1e-6, atol=2e-6)
    part = torch.randn((3, 10), generator=torch.Generator().manual_seed(6))[:, :7]
    torch.testing.assert_close(native.softcap(part, 2.0), 2 * torch.tanh(part / 2))


@pytest.mark.parametrize("preset", ["classic", "modern"])
def test_torch_gives_the_same_tokens(preset: str) -> None:
    prompts = [[(7 * i + j) % VOCAB for j in range(5 + 9 * i)] for i in range(4)]
    answers = []
    for kernels in ("auto", "torch"):
        engine = make_engine(make_model(preset), kernels=kernels)
        assert (engine.runner.native is not None) == (kernels == "auto")
        answers.append([answer(engine, ask(str(i), p)) for i, p in enumerate(prompts)])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("preset", ["classic", "modern"])
def test_decodes_equal_prompt_bitwise(preset: str, level: str) -> None:
    load_level(16, 2, level)
    runner = make_engine(make_model.__wrapped__(preset), kernels=level).runner
    tokens = [(11 * i * i + i) % VOCAB for i in range(100)]

    def logits(slot: int, size: int, decode: bool) -> Tensor:
        s = Sequence(ask("", tokens), tokens, seed=0, max_length=101, slot=slot)
        counts = [(start, min(size, 100 - start)) for start in range(0, 100, size)]
        chunks = [ScheduledChunk(s, start, n, decode, num_logits=n) for start, n in counts]
        return torch.cat([runner.run([chunk]).logits for chunk in chunks])

    whole = logits(0, 100, decode=False)
    assert torch.equal(logits(1, 1, decode=True), whole)
    assert torch.equal(logits(2, 7, decode=True), whole)
    assert torch.equal(logits(0, 33, decode=False), whole)
