"""From logits to tokens: a pure function of (logits, parameters, seed, position), in batches.

The noise is counter-based: a hash of seed and position. There is no generator whose state could
depend on the batch, on preemption or on the engine that runs a request. S rows, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_ray.machine import send

SAMPLED, TOP_K, TOP_P, MIN_P, NUCLEUS = 1, 2, 4, 8, 16
"""Features that a row of a batch may use; a feature that no row uses is not computed. NUCLEUS is
set for a row with TOP_P and without TOP_K."""

MIN_TEMPERATURE = 0.01
"""Temperatures between 0 and this are raised to it, as in vLLM: below it float32 overflows, and
only the likeliest token has any probability anyway."""
MAX_TEMPERATURE = 1e30
"""Larger temperatures are lowered to it: float32 cannot represent them, and all tokens are equally
likely anyway."""
INVALID = -1
"""Token id of a row whose logits are not finite: only its request fails."""

_GOLDEN = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class Rows:
    """Parameters of S rows, each ``[S]``; "off" values are those of ``SamplingParams``."""

    temperature: Tensor
    """float32"""
    top_k: Tensor
    """int64"""
    top_p: Tensor
    """float64"""
    min_p: Tensor
    """float32"""
    seed: Tensor
    """int64, any bits"""
    widest: int
    """The largest ``top_k`` below V of those rows that sample; 0 if none has one."""


def to_int64(value: int) -> int:
    """The int64 with the same low 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    # int64 shifts copy the sign: mask it off for the logical shift that the hash is made of.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); multiplication wraps."""
    x = (x ^ _shift(x, 30)) * to_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * to_int64(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """float64 in [0, 1), shaped like the two int64 arguments, a function of their values alone."""
    # 52 bits: u * total then rounds below total, whatever the total.
    return _shift(_mix(_mix(seed) + position * to_int64(_GOLDEN)), 12).double() * 2.0**-52


def choose(logits: Tensor, rows: Rows, positions: Tensor, features: int) -> Tensor:
    """Token ids int64 ``[S]`` for float32 ``logits [S, V]``; ``INVALID`` for a row that contains
    NaN or whose largest logit is not finite.

    ``positions [S]`` are those of the tokens in their sequences; ``features`` is the union of what
    the rows use.
    """
    peak, _ = best = logits.max(dim=-1)
    if not features & SAMPLED:
        return _or_invalid(*best)
    hot = rows.temperature > 0
    x = distribution(logits, rows, features)
    # Inverse of the cumulative distribution in the order of token ids: unlike one in the order of
    # probability, it does not depend on how a sort breaks ties.
    cumulative = x.exp_().cumsum(dim=-1, dtype=torch.float64)
    target = uniform(rows.seed, positions)[:, None] * cumulative[:, -1:]
    samples = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return _or_invalid(peak, torch.where(hot, samples, best.indices))


def distribution(logits: Tensor, rows: Rows, features: int) -> Tensor:
    """Log-weights float32 ``[S, V]`` of what ``choose`` samples from: divided by the temperature,
    the largest 0, -inf for tokens that top-k, top-p or min-p leave out. Those of a greedy row are
    not divided."""
    hot = rows.temperature > 0
    # The maximum is subtracted first: divided by a small temperature it could be infinite, and
    # inf - inf is NaN.
    x = (logits - logits.amax(dim=-1, keepdim=True)) / torch.where(hot, rows.temperature, 1.0)[
        :, None
    ]
    if features & MIN_P:
        # Nguyen et al., arXiv 2407.01082: p >= min_p * p_max.
        x = x.masked_fill(x < rows.min_p.log()[:, None], -torch.inf)
    if features & (TOP_K | TOP_P):
        x = x.masked_fill(x < _threshold(x, rows, features)[:, None], -torch.inf)
    return x


def greedy(logits: Tensor) -> Tensor:
    """The likeliest tokens int64 ``[S]`` of ``logits [S, V]``; ``INVALID`` as in ``choose``."""
    return _or_invalid(*logits.max(dim=-1))


def _or_invalid(peak: Tensor, tokens: Tensor) -> Tensor:
    return torch.where(peak.isfinite(), tokens, INVALID)


def _threshold(x: Tensor, rows: Rows, features: int) -> Tensor:
    """Smallest log-weight ``[S]`` that top-k and then top-p keep, of log-weights ``x [S, V]``.

    Tokens as likely as the last one that is kept are kept too, so that the result is a function of
    the values alone.
    """
    V = x.size(-1)
    has_no_top_k = (rows.top_k <= 0) | (rows.top_k >= V)
    k = torch.where(has_no_top_k, V, rows.top_k)
    widest = min(V, max(1, rows.widest))
    if not features & TOP_P:
        values = x.topk(widest).values
        kth = values.gather(1, (k - 1).clamp_max(widest - 1)[:, None])[:, 0]
        return torch.where(has_no_top_k, -torch.inf, kth)
    nucleus = rows.top_p < 1
    everything = x.exp().sum(dim=-1, dtype=torch.float64)
    width = min(V, max(widest, 128))
    if x.device.type != "cpu" and features & NUCLEUS:
        width = V  # to check whether less is enough, the host would wait for the GPU
    while True:
        values = x.topk(width).values  # sorted, largest first
        mass = values.double().exp()
        cumulative = mass.cumsum(dim=-1)
        last = (k - 1).clamp_max(width - 1)[:, None]
        total = torch.where(has_no_top_k, everything, cumulative.gather(1, last)[:, 0])
        goal = rows.top_p * total
        # Sorting a large vocabulary is slow: sort only as much as the rows' nuclei need.
        short = nucleus & has_no_top_k & (cumulative[:, -1] < goal)
        if width == V or not features & NUCLEUS or not bool(short.any()):
            break
        width = min(V, width * 8)
    count = (cumulative - mass < goal[:, None]).sum(dim=-1).clamp_min(1)
    at = torch.where(nucleus, torch.minimum(count, k), k).clamp_max(width) - 1
    value = values.gather(1, at[:, None])[:, 0]
    return torch.where(has_no_top_k & ~nucleus, -torch.inf, value)


def penalise(
    logits: Tensor,
    in_text: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """New logits ``[S, V]``: ``in_text`` (bool, in prompt or output), ``counts`` (float32, in the
    output) are ``[S, V]``, penalties float32 ``[S]``."""
    strong = repetition[:, None]
    logits = torch.where(in_text, torch.where(logits > 0, logits / strong, logits * strong), logits)
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def mask_rows(logits: Tensor, rows: Tensor, mask: Tensor) -> Tensor:
    """New logits ``[S, V]``: -inf in ``rows`` (int64 ``[G]``) for tokens outside of ``mask`` (bool
    ``[G, V]``)."""
    return logits.index_copy(0, rows, logits[rows].masked_fill_(~mask, -torch.inf))


def insert(ids: Tensor, pairs: Sequence[tuple[int, int]], source: Tensor) -> None:
    """Copies tokens that only the device knows: ``ids[first] = source[second]`` for each pair."""
    indices, rows = send(torch.tensor(pairs), ids.device).unbind(1)
    ids.index_copy_(0, indices, source[rows])


def log_probabilities(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the ``tokens [S]``: float32 ``[S]``; of the likeliest: ids and values ``[S, top]``.
    An ``INVALID`` token gets any value."""
    logs = logits.log_softmax(dim=-1)
    tokens = tokens.clamp_min(0)
    values, ids = logs.topk(top) if top else (logs[:, :0], logs[:, :0].long())
    return logs.gather(1, tokens[:, None])[:, 0], ids, values
