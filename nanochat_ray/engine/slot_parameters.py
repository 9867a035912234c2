"""Sampling parameters of the running requests, by slot. V tokens of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PENALTY, BIAS, BAN = 32, 64, 128
"""Features of a request beyond those of ``sampler``."""


@dataclass
class SlotParameters:
    """One row for each slot. Tables over the vocabulary are None until a request needs them."""

    features: Tensor
    """int64 ``[slots]``, on the CPU: what the request uses"""
    temperature: Tensor
    """float32 ``[slots]``"""
    top_k: Tensor
    """int64 ``[slots]``"""
    top_p: Tensor
    """float64 ``[slots]``"""
    min_p: Tensor
    """float32 ``[slots]``"""
    seed: Tensor
    """int64 ``[slots]``, any bits"""
    penalties: Tensor
    """float32 ``[slots, 3]``: repetition, presence, frequency"""
    ban_before: Tensor
    """int64 ``[slots]``: the first position at which banned tokens are allowed"""
    in_text: Tensor | None = None
    """bool ``[slots, V]``: in prompt or output"""
    counts: Tensor | None = None
    """float32 ``[slots, V]``: in the output"""
    bias: Tensor | None = None
    """float32 ``[slots, V]``"""
    bans: Tensor | None = None
    """bool ``[slots, V]``"""

    @classmethod
    def zeros(cls, slots: int, device: torch.device) -> SlotParameters:
        def column(dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, dtype=dtype, device=device)

        return cls(
            features=torch.zeros(slots, dtype=torch.int64),
            temperature=column(torch.float32),
            top_k=column(torch.int64),
            top_p=column(torch.float64),
            min_p=column(torch.float32),
            seed=column(torch.int64),
            penalties=torch.zeros((slots, 3), device=device),
            ban_before=column(torch.int64),
        )
