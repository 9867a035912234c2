"""The batched sampler against a slow one, and its noise against chance."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from nanochat_ray.engine import sampler
from nanochat_ray.engine.request import SamplingParams
from nanochat_ray.engine.sampler import (
    MIN_P,
    NUCLEUS,
    SAMPLED,
    TOP_K,
    TOP_P,
    Rows,
    choose,
    uniform,
)

ALL = SAMPLED | TOP_K | TOP_P | MIN_P | NUCLEUS


def rows(params: list[SamplingParams]) -> Rows:
    return Rows(
        temperature=torch.tensor([p.temperature for p in params]),
        top_k=torch.tensor([p.top_k for p in params]),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64),
        min_p=torch.tensor([p.min_p for p in params]),
        seed=torch.tensor([sampler.to_int64(p.seed or 0) for p in params]),
        widest=max(p.top_k for p in params),
    )


def splitmix(x: int) -> int:
    mask = 2**64 - 1
    x &= mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def slow_uniform(seed: int, position: int) -> float:
    return (splitmix(splitmix(seed) + position * 0x9E3779B97F4A7C15) >> 12) * 2.0**-52


def slow_weights(logits: Tensor, p: SamplingParams) -> dict[int, float]:
    """Weight of each token that one row may sample, by the book, in float64: temperature, min-p,
    top-k, top-p. Of a greedy row, the softmax of its logits."""
    values = logits.tolist()
    top = max(values)
    weights = {i: math.exp((v - top) / (p.temperature or 1.0)) for i, v in enumerate(values)}
    if p.temperature == 0:
        return weights
    weights = {i: w for i, w in weights.items() if w >= p.min_p}
    ranking = sorted(weights, key=lambda i: -weights[i])
    if p.top_k:
        ranking = ranking[: p.top_k]
    if p.top_p < 1:
        total, cumulative, nucleus = sum(weights[i] for i in ranking), 0.0, []
        for i in ranking:
            if cumulative >= p.top_p * total:
                break
            nucleus.append(i)
            cumulative += weights[i]
        ranking = nucleus
    return {i: weights[i] for i in ranking}


def slow_choice(logits: Tensor, p: SamplingParams, position: int) -> int:
    """One row by the book: the inverse CDF of ``slow_weights`` in the order of token ids."""
    weights = slow_weights(logits, p)
    if p.temperature == 0:
        return max(weights, key=lambda i: weights[i])
    target = slow_uniform((p.seed or 0) & (2**64 - 1), position) * sum(weights.values())
    cumulative = 0.0
    for i in sorted(weights):
        cumulative += weights[i]
        if cumulative > target:
            return i
    raise AssertionError("no token")


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 1.0, 2.0]),
        top_k=rng.choice([0, 0, 1, 5, 200, 10_000]),
        top_p=rng.choice([1.0, 0.01, 0.5, 0.95, 0.9999]),
        min_p=rng.choice([0.0, 0.0, 0.01, 0.3, 1.0]),
        seed=rng.randrange(-(2**63), 2**64),
    )


@pytest.mark.parametrize("vocab", [7, 300, 5000])
def test_equals_the_slow_sampler_row_by_row(vocab: int) -> None:
    rng = random.Random(vocab)
    generator = torch.Generator().manual_seed(vocab)
    for scale in (0.1, 3.0):
        params = [random_params(rng) for _ in range(40)]
        positions = torch.tensor([rng.randrange(100_000) for _ in params])
        logits = torch.randn(len(params), vocab, generator=generator) * scale
        actual = choose(logits, rows(params), positions, ALL).tolist()
        want = [
            slow_choice(row, p, int(at))
            for row, p, at in zip(logits, params, positions, strict=True)
        ]
        assert actual == want
        # A row by itself, with only the features that it uses.
        for i, p in enumerate(params):
            row_features = SAMPLED * (p.temperature > 0) | TOP_K * (0 < p.top_k < vocab)
            row_features |= (TOP_P | NUCLEUS) * (p.top_p < 1) | MIN_P * (p.min_p > 0)
            alone = choose(logits[i : i + 1], rows([p]), positions[i : i + 1], row_features)
            assert alone.tolist() == [actual[i]]


def test_each_row_has_its_own_top_k() -> None:
    """Without top-p, by hand: the tokens that are left of 4, 3, 2, 1, 0."""
    logits = torch.arange(5).flip(0).float().expand(4, 5)
    params = [SamplingParams(top_k=k) for k in (1, 3, 0, 9)]
    log_weights = sampler.distribution(logits, rows(params), SAMPLED | TOP_K)
    assert log_weights.isfinite().sum(dim=-1).tolist() == [1, 3, 5, 5]
    assert log_weights[1].tolist() == [0, -1, -2, -math.inf, -math.inf]
    assert torch.equal(log_weights, sampler.distribution(logits, rows(params), ALL))


def test_ties_at_the_threshold_are_kept() -> None:
    logits = torch.tensor([[1.0, 2.0, 1.0, 2.0, 1.0, -5.0]])
    for params, want_ids in (
        (SamplingParams(top_k=1), {1, 3}),
        (SamplingParams(top_k=3), {0, 1, 2, 3, 4}),
        (SamplingParams(top_p=0.2), {1, 3}),
    ):
        token_ids = {
            int(choose(logits, rows([params]), torch.tensor([at]), ALL)) for at in range(200)
        }
        assert token_ids == want_ids


def test_top_p_keeps_the_smallest_set() -> None:
    """A token whose probability is exactly top_p is enough; a little more needs the next one."""
    logits = torch.tensor([[-1.0, 0.0, -9.0]])
    share = 1 / (1 + float(logits[0, 0].double().exp()))  # of token 1 among the two of top-k
    for top_p, want_ids in ((share, {1}), (share * 1.0001, {0, 1})):
        step = rows([SamplingParams(top_k=2, top_p=top_p)])
        samples = choose(logits.expand(100, -1), step, torch.arange(100), ALL)
        assert set(samples.tolist()) == want_ids


def test_one_row_of_a_batch_may_need_many_tokens() -> None:
    """Weights of r^i, r = exp(-1/1000), i < 1000: 90% of them are the first n with
    1 - r^n >= 0.9 (1 - r^1000), so n = -1000 ln 0.43109 = 841.4, rounded up. The sort of the
    likeliest 128 is enough for the other row alone."""
    flat = torch.arange(1000.0) / -1000
    logits = torch.stack((flat, 100 * flat))
    logits[1, 0] = 50.0
    step = rows([SamplingParams(top_p=0.9)] * 2)
    weights = sampler.distribution(logits, step, SAMPLED | TOP_P | NUCLEUS)
    assert weights.isfinite().sum(dim=-1).tolist() == [842, 1]


def test_only_finite_maxima_give_tokens() -> None:
    logits = torch.tensor(
        [[0.0, 1.0], [0.0, torch.inf], [torch.nan, 0.0], [-torch.inf, -torch.inf]]
    )
    step = rows([SamplingParams(seed=1)] * 4)
    assert sampler.greedy(logits).tolist() == [1, -1, -1, -1]
    assert choose(logits, step, torch.arange(4), ALL)[1:].tolist() == [-1, -1, -1]
    assert choose(logits, step, torch.arange(4), 0).tolist() == [1, -1, -1, -1]


def test_noise_is_uniform() -> None:
    n, bins = 100_000, 100
    count = torch.arange(n)
    sevens = torch.full((n,), 7)
    for u in (uniform(sevens, count), uniform(count, sevens), uniform(count, count)):
        assert u.dtype == torch.float64
        assert float(u.min()) >= 0
        assert float(u.max()) < 1
        histogram = torch.bincount((u * bins).long(), minlength=bins).double()
        chi2 = float(((histogram - n / bins) ** 2 / (n / bins)).sum())
        assert chi2 < 148  # 99 degrees of freedom, p = 0.001
        assert abs(float(torch.corrcoef(torch.stack((u[1:], u[:-1])))[0, 1])) < 0.01
    assert float(uniform(torch.tensor(5), torch.tensor(9))) == slow_uniform(5, 9)


def test_noise_is_its_definition_bit_by_bit() -> None:
    seeds = [0, 1, 5, -1, 2**63 - 1, -(2**63)]
    positions = [0, 1, 9, 1000, 2**31, 2**40]
    pairs = torch.cartesian_prod(torch.tensor(seeds), torch.tensor(positions))
    want = [slow_uniform(seed, position) for seed in seeds for position in positions]
    assert uniform(pairs[:, 0], pairs[:, 1]).tolist() == want


def test_samples_follow_the_softmax() -> None:
    n = 20_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, -torch.inf])
    p = SamplingParams(temperature=0.8, seed=3)
    samples = choose(logits.expand(n, -1), rows([p] * n), torch.arange(n), SAMPLED)
    want = (logits / 0.8).softmax(-1) * n
    histogram = torch.bincount(samples, minlength=6)
    assert histogram[5] == 0
    chi2 = float(((histogram - want) ** 2 / want)[:5].sum())
    assert chi2 < 18.5  # 4 degrees of freedom, p = 0.001


def test_penalties_follow_their_definitions() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5]])
    token_ids = torch.tensor([[True, True, False, False]])
    counts = torch.tensor([[3.0, 1.0, 0.0, 0.0]])
    one = torch.ones(1)
    actual = sampler.penalise(logits, token_ids, counts, 2 * one, 0.5 * one, 0.25 * one)
    torch.testing.assert_close(actual, torch.tensor([[1 - 0.75 - 0.5, -4 - 0.25 - 0.5, 1.0, 0.5]]))
