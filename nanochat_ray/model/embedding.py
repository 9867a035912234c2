"""Embedding tables, whose gradient on a GPU is summed in a fixed order."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.machine import use_triton


class TokenOrder:
    """Where each row of a vocabulary occurs in a batch; tables that embed it share it.

    Only gradients need it: it is computed in the backward pass, since at the start of a step a GPU
    would wait for the launches.
    """

    def __init__(self, ids: Tensor, vocab: int):
        self._vocab, self.ids = vocab, ids.flatten().contiguous()
        """int64 ``[N]``"""

    @cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        """int64 ``[N]``: the positions of a batch of N tokens, by token id and then by position;
        and ``[V + 1]``: where the positions of each id begin."""
        sorted_ids, tokens = self.ids.sort(stable=True)
        rows = torch.arange(self._vocab + 1, device=self.ids.device)
        return tokens, torch.searchsorted(sorted_ids, rows)


def token_order(ids: Tensor, vocab: int) -> TokenOrder | None:
    """For ``ids [B, T]`` int64 where kernels of this project compute the gradient; else None."""
    if not torch.is_grad_enabled() or not use_triton(ids.device):
        return None
    return TokenOrder(ids, vocab)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, table: Tensor, ids: Tensor, order: TokenOrder, dtype: torch.dtype
    ) -> Tensor:
        from nanochat_ray.model.triton_embedding import gather

        ctx.order, ctx.table_dtype = order, table.dtype
        return gather(table, order.ids, dtype).view(*ids.shape, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from nanochat_ray.model.triton_embedding import sum_by_token

        grad = grads[0].flatten(0, -2).contiguous()
        order: TokenOrder = ctx.order
        result = sum_by_token(grad, order.ids, *order.positions, ctx.table_dtype)
        return result, None, None, None


def embed(table: Tensor, ids: Tensor, order: TokenOrder | None, dtype: torch.dtype) -> Tensor:
    """Rows of ``table [V, C]`` for ``ids [B, T]`` int64, as ``[B, T, C]`` of ``dtype``."""
    if order is None:
        return F.embedding(ids, table).to(dtype)
    result: Tensor = _Embedding.apply(table, ids, order, dtype)
    return result
