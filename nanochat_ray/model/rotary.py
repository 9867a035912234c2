"""Rotary position embedding (Su et al., arXiv 2104.09864) on the two halves of a head."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 ``[length, head_dim / 2]``; row p is position p."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32)
    angles = torch.outer(torch.arange(length, dtype=torch.float32), base ** (-channel / head_dim))
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns ``x [B, T, H, D]`` by the angles of ``cos``, ``sin [B or 1, T, 1, D/2]``.

    By minus the angle, as nanochat does: only the difference of two positions matters to
    attention, but weights carry over between implementations that agree on the sign.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
