"""Rotary position embedding (Su et al., arXiv 2104.09864) on the two halves of a head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

YARN_SLOW, YARN_FAST = 1.0, 32.0
"""Turns over the trained context: channels below the first are interpolated, above the second
left alone (the paper's alpha and beta)."""


def yarn_frequencies(frequencies: Tensor, trained: int, factor: float) -> Tensor:
    """``frequencies [D / 2]`` in radians a position, for ``factor`` times the trained context.

    NTK-by-parts of YaRN (Peng et al., arXiv 2309.00071, section 3.2): a channel that turns less
    than once in training would meet unseen angles and is slowed by ``factor``; one that turns
    often tells near tokens apart and stays; between them a linear ramp.
    """
    turns = trained * frequencies / (2 * math.pi)
    keep = ((turns - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0.0, 1.0)
    return frequencies * (keep + (1 - keep) / factor)


def yarn_sharpening(factor: float) -> float:
    """What the scores are multiplied by, since more tokens share the attention (section 3.3)."""
    return (0.1 * math.log(factor) + 1.0) ** 2


def rotary_tables(
    length: int, head_dim: int, base: float, *, trained: int = 0, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 ``[length, head_dim / 2]``; row p is position p.

    ``factor`` above 1 stretches the ``trained`` positions by YaRN.
    """
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequencies = base ** (-channel / head_dim)
    if factor > 1:
        frequencies = yarn_frequencies(frequencies, trained, factor)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``x [..., H, D]`` by the angles of ``cos`` and ``sin [..., 1, D / 2]``.

    By minus the angle, as nanochat does: only the difference of two positions matters to
    attention, but weights carry over only between implementations that agree on the sign.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
