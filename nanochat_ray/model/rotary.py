"""Rotary position embedding (Su et al., arXiv 2104.09864) on the two halves of a head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

YARN_SLOW, YARN_FAST = 1.0, 32.0
"""Rotations over the training context: channels below the first are interpolated, above the second
unchanged (the paper's alpha and beta)."""


def yarn_frequencies(frequencies: Tensor, train_length: int, factor: float) -> Tensor:
    """``frequencies [D / 2]`` in radians per position, for ``factor`` times the training context of
    ``train_length`` positions.

    NTK-by-parts of YaRN (Peng et al., arXiv 2309.00071, section 3.2): a channel that rotates less
    than once in training would meet new angles and is slowed down by ``factor``; one that rotates
    often tells near tokens apart and is unchanged; in between the share is a linear ramp.
    """
    rotations = train_length * frequencies / (2 * math.pi)
    unchanged_share = ((rotations - YARN_SLOW) / (YARN_FAST - YARN_SLOW)).clamp(0.0, 1.0)
    return frequencies * (unchanged_share + (1 - unchanged_share) / factor)


def yarn_sharpening(factor: float) -> float:
    """The factor on attention scores, since more tokens share the attention (section 3.3)."""
    return (0.1 * math.log(factor) + 1.0) ** 2


def rotary_tables(
    length: int, head_dim: int, base: float, *, train_length: int = 0, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 ``[length, head_dim / 2]``; row p is position p.

    ``factor`` above 1 extends the ``train_length`` positions of training by YaRN.
    """
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32)
    frequencies = base ** (-channel / head_dim)
    if factor > 1:
        frequencies = yarn_frequencies(frequencies, train_length, factor)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates ``x [..., H, D]`` by the angles of ``cos`` and ``sin [..., 1, D / 2]``.

    By minus the angle, as nanochat does: only the difference of two positions matters to
    attention, but weights carry over only between implementations that agree on the sign.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
