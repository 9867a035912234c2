"""Bits per byte: a loss that does not depend on the tokenizer."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.distributed as dist

from nanochat_ray.model.gpt import GPT


@torch.no_grad()
def bits_per_byte(
    model: GPT, ids: np.ndarray, byte_lengths: np.ndarray, *, micro_batch_size: int
) -> float:
    """Bits the model needs per byte of the text in ``ids [n, T + 1]``.

    ``byte_lengths [vocab_size]`` holds the bytes of each token, 0 for special tokens, which are
    not counted. Every rank gives its own rows and gets the figure over all of them.
    """
    device = next(model.parameters()).device
    lengths = torch.from_numpy(byte_lengths.astype(np.int64)).to(device)
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for at in range(0, len(ids), micro_batch_size):
        rows = torch.from_numpy(ids[at : at + micro_batch_size].astype(np.int64)).to(device)
        targets = rows[:, 1:].contiguous()
        size = lengths[targets]
        targets = targets.masked_fill(size == 0, -1)
        totals[0] += model.loss(rows[:, :-1].contiguous(), targets, reduction="sum").double()
        totals[1] += size.sum()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
    nats, count = totals.tolist()
    return nats / (math.log(2) * max(count, 1))


@torch.no_grad()
def masked_loss(model: GPT, ids: np.ndarray, mask: np.ndarray, *, micro_batch_size: int) -> float:
    """Mean nats over the tokens of ``ids [n, T + 1]`` that ``mask`` marks, over all ranks."""
    device = next(model.parameters()).device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for at in range(0, len(ids), micro_batch_size):
        rows = torch.from_numpy(ids[at : at + micro_batch_size].astype(np.int64)).to(device)
        kept = torch.from_numpy(mask[at : at + micro_batch_size, 1:].astype(bool)).to(device)
        targets = rows[:, 1:].masked_fill(~kept, -1)
        totals[0] += model.loss(rows[:, :-1].contiguous(), targets, reduction="sum").double()
        totals[1] += kept.sum()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(totals)
    nats, count = totals.tolist()
    return nats / max(count, 1)
