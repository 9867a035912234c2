"""Embedding tables, whose gradient on a GPU is summed in a fixed order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.machine import use_triton


class TokenOrder(NamedTuple):
    """Where each row of a vocabulary occurs in a batch; tables that embed it share it."""

    tokens: Tensor
    """int64 ``[N]``: the positions of a batch of N tokens, by token id and then by position."""
    starts: Tensor
    """int64 ``[V + 1]``: where the positions of each id begin."""


def token_order(ids: Tensor, vocab: int) -> TokenOrder | None:
    """For ``ids [B, T]`` int64 where kernels of this project compute the gradient; else None."""
    if not torch.is_grad_enabled() or not use_triton(ids.device):
        return None
    sorted_ids, tokens = ids.flatten().sort(stable=True)
    rows = torch.arange(vocab + 1, device=ids.device)
    return TokenOrder(tokens, torch.searchsorted(sorted_ids, rows))


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, ids: Tensor, order: TokenOrder, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(*order)
        ctx.table_dtype = table.dtype
        return F.embedding(ids, table).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from nanochat_ray.model.triton_embedding import sum_by_token

        order = TokenOrder(*ctx.saved_tensors)
        grad = grads[0].flatten(0, -2).contiguous()
        return sum_by_token(grad, *order, ctx.table_dtype), None, None, None


def embed(table: Tensor, ids: Tensor, order: TokenOrder | None, dtype: torch.dtype) -> Tensor:
    """Rows of ``table [V, C]`` for ``ids [B, T]`` int64, as ``[B, T, C]`` of ``dtype``."""
    if order is None:
        return F.embedding(ids, table).to(dtype)
    result: Tensor = _Embedding.apply(table, ids, order, dtype)
    return result
