"""The gradient of an embedding table in Triton: a sum over the tokens of each row.

torch's own copies the gradient to float32, sorts the tokens for each table, and adds in two
kernels; one compiled by Inductor adds atomically, in another order each time.
"""

# Triton resolves every name in a kernel's signature: it can have no annotations but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 16
"""Tokens of a tile."""


@triton.jit
def _sum_by_token_kernel(
    grad_ptr,
    tokens_ptr,
    starts_ptr,
    out_ptr,
    C,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row of the table, BLOCK_C columns of it: its tokens in order of their positions."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    for at in range(first, last, BLOCK_N):
        index = at + tl.arange(0, BLOCK_N)
        tokens = tl.load(tokens_ptr + index, mask=index < last, other=0)
        mask = (index < last)[:, None] & (columns < C)[None, :]
        values = tl.load(grad_ptr + tokens[:, None] * C + columns[None, :], mask=mask, other=0.0)
        sums += tl.sum(values.to(tl.float32), axis=0)
    tl.store(out_ptr + row * C + columns, sums.to(out_ptr.dtype.element_ty), mask=columns < C)


def sum_by_token(grad: Tensor, tokens: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
    """``[V, C]`` of ``dtype``: row v is the float32 sum of ``grad [N, C]`` over the tokens
    ``tokens[starts[v] : starts[v + 1]]`` (int64)."""
    assert grad.is_contiguous()
    vocab, C = starts.numel() - 1, grad.size(-1)
    out = torch.empty((vocab, C), dtype=dtype, device=grad.device)
    block = min(256, triton.next_power_of_2(C))
    _sum_by_token_kernel[(vocab, triton.cdiv(C, block))](
        grad, tokens, starts, out, C, BLOCK_N=BLOCK_N, BLOCK_C=block, num_warps=4
    )
    return out
