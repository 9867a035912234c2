"""Causal attention with grouped heads and windows, and the seam where a KV cache plugs in."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class AttentionContext(Protocol):
    """Keys and values of earlier tokens, for cached inference.

    The model calls ``attend`` once for each layer, in order, with the new tokens' queries, keys
    and values; the context keeps the keys and values and attends over all it holds of each row.
    How it lays memory out is its own affair.
    """

    positions: Tensor
    """int64 ``[B, T]``: the place of each new token in its sequence."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """``q [B, T, H, D]``, ``k`` and ``v [B, T, Hkv, D]`` → ``[B, T, H, D]``.

        A token sees itself and the ``window`` tokens before it, all of them if -1.
        """
        ...


@functools.lru_cache(maxsize=8)
def _band(length: int, window: int, device: torch.device) -> Tensor:
    """bool ``[T, T]``: True where query i may see key j."""
    i = torch.arange(length, device=device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance <= window)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Self-attention inside rows that start at position 0; shapes as in ``attend``.

    ``scale`` multiplies the scores before the softmax.
    """
    T, grouped = q.size(1), q.size(2) != k.size(2)
    q_BHTD, k_BHTD, v_BHTD = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if window < 0 or window >= T - 1:
        y = F.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, is_causal=True, scale=scale, enable_gqa=grouped
        )
    else:
        mask = _band(T, window, q.device)
        y = F.scaled_dot_product_attention(
            q_BHTD, k_BHTD, v_BHTD, attn_mask=mask, scale=scale, enable_gqa=grouped
        )
    return y.transpose(1, 2)
