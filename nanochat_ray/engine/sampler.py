"""From logits to tokens: a pure function of (logits, parameters, seed, position), by the batch.

The noise is counter-based: a hash of seed and position, so there is no generator whose state
could depend on the batch, on preemption or on the engine that runs a request. S rows, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_ray.machine import send

SAMPLED, TOP_K, TOP_P, MIN_P, NUCLEUS = 1, 2, 4, 8, 16
"""Features that any row of a batch uses; what no row uses costs nothing. NUCLEUS comes with a
TOP_P without TOP_K."""

MIN_TEMPERATURE = 0.01
"""Temperatures between 0 and this are raised to it, as in vLLM: below it float32 overflows, and
the likeliest token is all that is left anyway."""
MAX_TEMPERATURE = 1e30
"""Larger ones are lowered to it: float32 cannot hold them, and all tokens are as likely anyway."""
INVALID = -1
"""The token of a row whose logits are not finite: its request fails, and no other."""

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


def signed(value: int) -> int:
    """The int64 with the same low 64 bits."""
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    # int64 shifts copy the sign: mask it off for the logical shift that the hash is made of.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); products wrap."""
    x = (x ^ _shift(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def uniform(seed: Tensor, position: Tensor) -> Tensor:
    """float64 in [0, 1), shaped like the two int64 arguments, a function of their values alone."""
    # 52 bits: u * total then rounds below total, whatever the total.
    return _shift(_mix(_mix(seed) + position * signed(_GOLDEN)), 12).double() * 2.0**-52


def choose(logits: Tensor, rows: Rows, positions: Tensor, features: int) -> Tensor:
    """Token ids int64 ``[S]`` for float32 ``logits [S, V]``; ``INVALID`` for a row that holds NaN
    or whose largest logit is not finite.

    ``positions [S]`` are the places that the tokens will have in their sequences; ``features``
    is the union of what the rows use.
    """
    peak, _ = best = logits.max(dim=-1)
    if not features & SAMPLED:
        return _checked(*best)
    hot = rows.temperature > 0
    # The maximum goes first: a small temperature would make it infinite, and inf - inf is NaN.
    x = (logits - peak[:, None]) / torch.where(hot, rows.temperature, 1.0)[:, None]
    if features & MIN_P:
        # Nguyen et al., arXiv 2407.01082: p >= min_p * p_max.
        x = x.masked_fill(x < rows.min_p.log()[:, None], -torch.inf)
    if features & (TOP_K | TOP_P):
        x = x.masked_fill(x < _threshold(x, rows, features)[:, None], -torch.inf)
    # Inverse of the cumulative distribution in the order of token ids: unlike one in the order of
    # probability, it does not hang on how a sort breaks ties.
    cumulative = x.exp_().cumsum(dim=-1, dtype=torch.float64)
    target = uniform(rows.seed, positions)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return _checked(peak, torch.where(hot, drawn, best.indices))


def greedy(logits: Tensor) -> Tensor:
    """The likeliest tokens int64 ``[S]`` of ``logits [S, V]``; ``INVALID`` as in ``choose``."""
    return _checked(*logits.max(dim=-1))


def _checked(peak: Tensor, tokens: Tensor) -> Tensor:
    return torch.where(peak.isfinite(), tokens, INVALID)


def _threshold(x: Tensor, rows: Rows, features: int) -> Tensor:
    """Smallest log-weight ``[S]`` that top-k and then top-p keep, of log-weights ``x [S, V]``.

    Tokens as likely as the last one that is kept are kept too, so that the outcome is a function
    of the values alone.
    """
    V = x.size(-1)
    unlimited = (rows.top_k <= 0) | (rows.top_k >= V)
    k = torch.where(unlimited, V, rows.top_k)
    widest = min(V, max(1, rows.widest))
    if not features & TOP_P:
        values = x.topk(widest).values
        kth = values.gather(1, (k - 1).clamp_max(widest - 1)[:, None])[:, 0]
        return torch.where(unlimited, -torch.inf, kth)
    nucleus = rows.top_p < 1
    everything = x.exp().sum(dim=-1, dtype=torch.float64)
    width = min(V, max(widest, 128))
    if x.device.type != "cpu" and features & NUCLEUS:
        width = V  # to look whether less is enough would be to wait for the GPU
    while True:
        values = x.topk(width).values  # sorted, largest first
        mass = values.double().exp()
        reached = mass.cumsum(dim=-1)
        last = (k - 1).clamp_max(width - 1)[:, None]
        total = torch.where(unlimited, everything, reached.gather(1, last)[:, 0])
        goal = rows.top_p * total
        # Sorting all of a large vocabulary is slow: only as much as some row's nucleus needs.
        short = nucleus & unlimited & (reached[:, -1] < goal)
        if width == V or not features & NUCLEUS or not bool(short.any()):
            break
        width = min(V, width * 8)
    count = (reached - mass < goal[:, None]).sum(dim=-1).clamp_min(1)
    at = torch.where(nucleus, torch.minimum(count, k), k).clamp_max(width) - 1
    value = values.gather(1, at[:, None])[:, 0]
    return torch.where(unlimited & ~nucleus, -torch.inf, value)


def penalise(
    logits: Tensor,
    seen: Tensor,
    counts: Tensor,
    repetition: Tensor,
    presence: Tensor,
    frequency: Tensor,
) -> Tensor:
    """New logits ``[S, V]``: ``seen`` (bool, in prompt or answer) and ``counts`` (float32, in the
    answer) are ``[S, V]``, the three penalties float32 ``[S]``."""
    strong = repetition[:, None]
    logits = torch.where(seen, torch.where(logits > 0, logits / strong, logits * strong), logits)
    return logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)


def allow(logits: Tensor, rows: Tensor, allowed: Tensor) -> Tensor:
    """New logits ``[S, V]``: in ``rows`` (int64 ``[G]``) only what ``allowed`` (bool ``[G, V]``)
    marks remains, the rest is -inf."""
    return logits.index_copy(0, rows, logits[rows].masked_fill_(~allowed, -torch.inf))


def insert(ids: Tensor, pairs: Sequence[tuple[int, int]], chosen: Tensor) -> None:
    """Writes tokens that are on the device alone: ``ids[first] = chosen[second]`` for each pair."""
    places, rows = send(torch.tensor(pairs), ids.device).unbind(1)
    ids.index_copy_(0, places, chosen[rows])


def log_probabilities(logits: Tensor, tokens: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the ``tokens [S]``: float32 ``[S]``; of the likeliest: ids and values ``[S, top]``.
    An ``INVALID`` token gets any value."""
    logs = logits.log_softmax(dim=-1)
    tokens = tokens.clamp_min(0)
    values, ids = logs.topk(top) if top else (logs[:, :0], logs[:, :0].long())
    return logs.gather(1, tokens[:, None])[:, 0], ids, values
