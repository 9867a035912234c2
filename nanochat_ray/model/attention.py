"""Causal self-attention of training, with grouped heads, windows and document masks."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


@functools.lru_cache(maxsize=8)
def _band(length: int, window: int, device: torch.device) -> Tensor:
    """bool ``[T, T]``: True where query i may see key j."""
    i = torch.arange(length, device=device)
    distance = i[:, None] - i[None, :]
    return (distance >= 0) & (distance <= window)


@functools.cache
def _compiled_flex() -> Any:
    # Uncompiled, it would keep all attention scores in memory.
    return torch.compile(flex_attention, dynamic=False)


def _block_mask(B: int, T: int, window: int, documents: Tensor | None, device: torch.device) -> Any:
    def visible(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        causal = (i >= j) & (i - j <= window)
        return causal if documents is None else causal & (documents[b, i] == documents[b, j])

    batch = None if documents is None else B
    return create_block_mask(visible, batch, None, T, T, device=str(device))


class SelfAttention:
    """Self-attention inside sequences ``[B, T]`` that start at position 0.

    One object serves all layers of a forward pass, so that a mask is built once for each window.
    ``documents`` is int ``[B, T]``, the number of the document that a token belongs to: tokens
    attend to their own document only. Without a mask torch's causal attention runs; with one,
    FlexAttention on CUDA, which skips blocks that are all masked, and a dense mask elsewhere.
    """

    def __init__(self, documents: Tensor | None = None):
        self.documents = documents
        self._masks: dict[int, Any] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        """``q [B, T, H, D]``, ``k`` and ``v [B, T, Hkv, D]`` → ``[B, T, H, D]``.

        A token sees itself and the ``window`` tokens before it, all of them if -1. ``scale``
        multiplies the attention scores.
        """
        B, T, H, _ = q.shape
        is_grouped = k.size(2) != H
        q_BHTD, k_BHTD, v_BHTD = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        window = T if window < 0 else min(window, T)
        if self.documents is None and window >= T - 1:
            y = F.scaled_dot_product_attention(
                q_BHTD, k_BHTD, v_BHTD, is_causal=True, scale=scale, enable_gqa=is_grouped
            )
            return y.transpose(1, 2)
        on_gpu = q.device.type == "cuda"
        if window not in self._masks:
            self._masks[window] = (
                _block_mask(B, T, window, self.documents, q.device)
                if on_gpu
                else self._dense(T, window)
            )
        mask = self._masks[window]
        if on_gpu:
            y = _compiled_flex()(
                q_BHTD, k_BHTD, v_BHTD, block_mask=mask, scale=scale, enable_gqa=is_grouped
            )
        else:
            y = F.scaled_dot_product_attention(
                q_BHTD, k_BHTD, v_BHTD, attn_mask=mask, scale=scale, enable_gqa=is_grouped
            )
        return y.transpose(1, 2)

    def _dense(self, T: int, window: int) -> Tensor:
        if self.documents is None:
            return _band(T, window, torch.device("cpu"))
        same = self.documents[:, :, None] == self.documents[:, None, :]
        return (_band(T, window, self.documents.device) & same)[:, None]
