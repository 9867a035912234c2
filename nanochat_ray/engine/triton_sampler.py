"""``sampler.choose`` in one Triton kernel: a row of logits stays in registers, nothing is sorted.

Top-k and top-p keep every token whose logit is at least a threshold. Floats order like integers
after a flip of their bits, so the threshold is found by bisection over 32 bits; each step is one
count or one sum over the row. Sums are float64 in an order that depends on the row alone.
"""

# Triton resolves every name in a kernel's signature: it can have no annotations but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat_ray.engine.sampler import INVALID

MAX_VOCAB = 1 << 16
"""Largest vocabulary whose row fits the registers of one program."""


class SamplingColumns(Protocol):
    """Parameters of sampling, a row for each slot: ``SlotParameters``, or ``sampler.Rows``."""

    @property
    def temperature(self) -> Tensor:
        """float32"""
        ...

    @property
    def top_k(self) -> Tensor:
        """int64"""
        ...

    @property
    def top_p(self) -> Tensor:
        """float64"""
        ...

    @property
    def min_p(self) -> Tensor:
        """float32"""
        ...

    @property
    def seed(self) -> Tensor:
        """int64, any bits"""
        ...


@triton.jit
def _mix(x):
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), on uint64."""
    x = (x ^ (x >> 30)) * tl.full((), 0xBF58476D1CE4E5B9, tl.uint64)
    x = (x ^ (x >> 27)) * tl.full((), 0x94D049BB133111EB, tl.uint64)
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, position):
    """float64 in [0, 1), as ``sampler.uniform``."""
    golden = tl.full((), 0x9E3779B97F4A7C15, tl.uint64)
    bits = _mix(_mix(seed.to(tl.uint64)) + position.to(tl.uint64) * golden)
    return (bits >> 12).to(tl.float64) * 2.220446049250313e-16


@triton.jit
def _to_ordered_keys(x):
    """uint32 keys that order like the float32 ``x``."""
    bits = x.to(tl.uint32, bitcast=True)
    negative = (bits >> 31) == 1
    # Not ~bits, which the interpreter of Triton 3.7 refuses for unsigned numbers.
    return tl.where(negative, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _top_k(keys, weights, inside, k):
    """The k-th largest key, which fewer than k keys exceed, and the weight of the k largest."""
    threshold = tl.zeros((), tl.uint32)
    for bit in range(31, -1, -1):
        trial = threshold + ((tl.full((), 1, tl.uint32) << bit) - 1)
        above = tl.sum((inside & (keys > trial)).to(tl.int32), axis=0)
        threshold = tl.where(above < k, threshold, trial + 1)
    exceed = inside & (keys > threshold)
    # Of the tokens as likely as the k-th, only as many count as make k.
    at = tl.max(tl.where(keys == threshold, weights, 0.0), axis=0)
    missing = (k - tl.sum(exceed.to(tl.int32), axis=0)).to(tl.float64)
    return threshold, tl.sum(tl.where(exceed, weights, 0.0), axis=0) + missing * at


@triton.jit
def _top_p(keys, weights, goal):
    """The smallest key such that larger keys have less weight than ``goal``."""
    threshold = tl.zeros((), tl.uint32)
    for bit in range(31, -1, -1):
        trial = threshold + ((tl.full((), 1, tl.uint32) << bit) - 1)
        above = tl.sum(tl.where(keys > trial, weights, 0.0), axis=0)
        threshold = tl.where(above < goal, threshold, trial + 1)
    return threshold


@triton.jit
def _sample(x, ids, inside, k, top_p, min_p, uniform, vocab):
    """The token of one row of log-weights ``x``, of which the largest is 0."""
    if min_p > 0:
        x = tl.where(x < tl.log(min_p), float("-inf"), x)
    keys = _to_ordered_keys(x)
    weights = tl.where(inside & (x > float("-inf")), tl.exp(x), 0.0).to(tl.float64)
    mass = tl.sum(weights, axis=0)
    threshold = tl.zeros((), tl.uint32)
    if (k > 0) & (k < vocab):
        threshold, mass = _top_k(keys, weights, inside, k)
    if top_p < 1:
        threshold = tl.maximum(threshold, _top_p(keys, weights, top_p * mass))
    # The likeliest token stays whatever rounding does.
    weights = tl.where(inside & ((keys >= threshold) | (x == 0.0)), weights, 0.0)
    target = uniform * tl.sum(weights, axis=0)
    cumulative = tl.cumsum(weights, axis=0)
    token = tl.sum((inside & (cumulative <= target)).to(tl.int32), axis=0)
    # Another order of the sum may leave the last cumulative value below the total.
    return tl.minimum(token, tl.max(tl.where(weights > 0, ids, 0), axis=0))


@triton.jit
def _sample_kernel(
    logits_ptr, tokens_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, slots_ptr,
    position_ptr, stride, vocab, INVALID_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + row)
    ids = tl.arange(0, BLOCK)
    inside = ids < vocab
    x = tl.load(logits_ptr + row * stride + ids, mask=inside, other=float("-inf"))
    num_nan = tl.sum((x != x).to(tl.int32), axis=0)
    peak = tl.max(x, axis=0)
    token = tl.argmax(x, axis=0)
    temperature = tl.load(temperature_ptr + slot)
    fails = (num_nan > 0) | (peak == float("inf")) | (peak == float("-inf"))
    if (temperature > 0) & ~fails:
        x = tl.where(inside, (x - peak) / temperature, float("-inf"))
        k, top_p = tl.load(top_k_ptr + slot), tl.load(top_p_ptr + slot)
        uniform = _uniform(tl.load(seed_ptr + slot), tl.load(position_ptr + row))
        token = _sample(x, ids, inside, k, top_p, tl.load(min_p_ptr + slot), uniform, vocab)
    tl.store(tokens_ptr + row, tl.where(fails, INVALID_TOKEN, token).to(tl.int64))


def choose_by_slot(
    parameters: SamplingColumns, logits: Tensor, slots: Tensor, positions: Tensor
) -> Tensor:
    """As ``sampler.choose``, for all features: ids int64 ``[S]`` of float32 ``logits [S, V]``.

    ``slots`` int64 ``[S]`` are the rows of the ``parameters``. V is at most ``MAX_VOCAB``. Tokens
    are those of ``sampler.choose`` but where the random number falls within rounding of a token's
    edge.
    """
    S, V = logits.shape
    assert V <= MAX_VOCAB
    assert logits.dtype == torch.float32
    assert logits.stride(1) == 1
    tokens = torch.empty(S, dtype=torch.int64, device=logits.device)
    block = triton.next_power_of_2(V)
    p = parameters
    if S:
        _sample_kernel[(S,)](
            *(logits, tokens, p.temperature, p.top_k, p.top_p, p.min_p, p.seed, slots, positions),
            *(logits.stride(0), V),
            INVALID_TOKEN=INVALID,
            BLOCK=block,
            num_warps=min(32, max(4, block // 1024)),
        )
    return tokens
