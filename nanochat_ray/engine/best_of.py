"""The n best of several answers to one prompt. Torch-free: it works on requests and outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from nanochat_ray.engine.request import Output, Request


def spread(request: Request, count: int) -> list[Request]:
    """``count`` requests for the same prompt, whose answers differ and can be compared.

    The ids are the request's with ``-0``, ``-1``, … behind; the seeds count up from its own, so
    that the first answer is the request's, and a larger ``count`` only adds to the answers.
    ValueError if ``count`` is below 1.
    """
    if count < 1:
        raise ValueError(f"best_of={count!r} is not allowed: from 1")
    request = request.seeded()
    params, seed = request.params, request.params.seed
    assert seed is not None
    asked = 0 if params.logprobs is None else params.logprobs
    return [
        dataclasses.replace(
            request,
            id=f"{request.id}-{i}",
            params=dataclasses.replace(
                params, seed=(seed + i) % 2**63 if i else seed, logprobs=asked
            ),
        )
        for i in range(count)
    ]


def likelihood(answer: Sequence[Output], by: Literal["mean", "sum"] = "mean") -> float:
    """Log-probability of what the model chose, for each token or in all; -inf if the answer failed
    or holds nothing. ValueError if its request did not ask for ``logprobs``."""
    if not answer or answer[-1].finish not in ("stop", "length"):
        return -float("inf")
    if any(output.logprobs is None for output in answer if output.tokens):
        raise ValueError("logprobs: a request whose answers are compared must ask for them")
    chosen = [p.logprob for output in answer for p in output.logprobs or () if p is not None]
    if not chosen:
        return -float("inf")
    return sum(chosen) / (len(chosen) if by == "mean" else 1)


def best(
    answers: Sequence[Sequence[Output]], n: int, by: Literal["mean", "sum"] = "mean"
) -> list[int]:
    """Places of the ``n`` likeliest answers, the best first; among equals the earlier one.
    ValueError if there are fewer than ``n``."""
    if not 1 <= n <= len(answers):
        raise ValueError(f"n={n!r} is not allowed: from 1 to best_of={len(answers)}")
    scores = [likelihood(answer, by) for answer in answers]
    return sorted(range(len(answers)), key=lambda i: -scores[i])[:n]
