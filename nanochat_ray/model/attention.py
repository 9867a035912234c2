"""Causal self-attention of training, with grouped heads, windows and document masks.

A mask is built once for each window of a forward pass, outside the layers: these then have no side
effects, which ``torch.compile`` and activation checkpointing both require.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

MASK_BLOCK = 128
"""Positions on each side of the blocks that FlexAttention skips or leaves unmasked as a whole."""
AttentionMask = Tensor | BlockMask | None
"""None: all earlier tokens. A dense mask, bool ``[T, T]`` or ``[B, 1, T, T]``, where a query (row)
may see a key; or FlexAttention's mask on CUDA."""


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


def use_flash_attention_3(device: torch.device) -> bool:
    """Whether torch's attention without a mask runs on FlashAttention 3 from here on: on Hopper,
    with the package ``flash_attn_interface`` installed (Shah et al., arXiv 2407.08608)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    if importlib.util.find_spec("flash_attn_interface") is None:
        return False
    torch.nn.attention.activate_flash_attention_impl("FA3")
    return True


def attention_mask(
    ids: Tensor, window: int, documents: Tensor | None, *, flex: bool
) -> AttentionMask:
    """The mask of layers in which a token of ``ids [B, T]`` sees itself and the ``window`` tokens
    before it; all of them if -1.

    ``documents`` is int ``[B, T]``, the number of the document that a token belongs to, which
    never falls: tokens attend to their own document only. ``flex``: for FlexAttention.
    """
    T, device = ids.size(1), ids.device
    window = T if window < 0 else min(window, T)
    if documents is None and window >= T - 1:
        return None
    if documents is None:
        return _windows(T, window, device) if flex else _band(T, window, device)
    if flex:
        return block_mask(T, window, documents, device)
    same = documents[:, :, None] == documents[:, None, :]
    return (_band(T, window, device) & same)[:, None]


@functools.lru_cache(maxsize=8)
def _windows(length: int, window: int, device: torch.device) -> BlockMask:
    return block_mask(length, window, None, device)


def _visibility(window: Tensor, documents: Tensor | None) -> Callable[..., Tensor]:
    # The window is a tensor: as a number it would be a constant of the compiled attention, and
    # each window of a schedule would compile it again.
    def in_window(_b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i - j <= window)

    if documents is None:
        return in_window

    def in_document(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return in_window(b, h, i, j) & (documents[b, i] == documents[b, j])

    return in_document


def block_mask(
    length: int, window: int, documents: Tensor | None, device: torch.device
) -> BlockMask:
    """FlexAttention's mask, from the ends of its blocks alone.

    ``create_block_mask`` evaluates the mask at all ``[B, T, T]`` pairs. Here document numbers never
    fall, so the first and last token of a block tell whether it has a visible pair, and whether
    all of its pairs are visible.
    """
    starts = torch.arange(0, length, MASK_BLOCK, device=device)
    ends = (starts + MASK_BLOCK - 1).clamp_max(length - 1)
    q_start, k_start = starts[:, None], starts[None, :]
    q_end, k_end = ends[:, None], ends[None, :]
    some = (k_start <= q_end) & (q_start - k_end <= window)
    every = (k_end <= q_start) & (q_end - k_start <= window)
    # A block that reaches beyond the sequence is never whole.
    every = every & (q_start + MASK_BLOCK <= length) & (k_start + MASK_BLOCK <= length)
    if documents is not None:
        first, last = documents[:, starts], documents[:, ends]
        q_first, k_first = first[:, None, :, None], first[:, None, None, :]
        q_last, k_last = last[:, None, :, None], last[:, None, None, :]
        some = some & (q_first <= k_last) & (k_first <= q_last)
        every = every & (k_first == q_last)
    partial, whole = (
        _in_order(kind.view(-1, 1, len(starts), len(starts))) for kind in (some & ~every, every)
    )
    return BlockMask.from_kv_blocks(
        *partial,
        *whole,
        BLOCK_SIZE=MASK_BLOCK,
        mask_mod=_visibility(torch.full((), window, device=device), documents),
        seq_lengths=(length, length),
    )


def _in_order(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The number of True in each row of ``blocks [..., n]``, int32, and the indices ``[..., n]`` of
    the row, those of True first."""
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    return counts, blocks.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """``q [B, T, H, D]``, ``k`` and ``v [B, T, Hkv, D]`` → ``[B, T, H, D]``.

    ``mask`` is that of ``attention_mask``; ``scale`` multiplies the attention scores.
    """
    is_grouped = k.size(2) != q.size(2)
    q_BHTD, k_BHTD, v_BHTD = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if isinstance(mask, BlockMask):
        flex = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
        y = flex(q_BHTD, k_BHTD, v_BHTD, block_mask=mask, scale=scale, enable_gqa=is_grouped)
    else:
        y = F.scaled_dot_product_attention(
            q_BHTD,
            k_BHTD,
            v_BHTD,
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=is_grouped,
        )
    result: Tensor = y.transpose(1, 2)
    return result
