"""Embedding tables in Triton: rows in another dtype, and the gradient as a sum over tokens.

torch's own gradient copies it to float32, sorts the tokens for each table, and adds in two
kernels; one compiled by Inductor adds atomically, in another order each time.
"""

# Triton resolves every name in a kernel's signature: it can have no annotations but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 8
"""Tokens of a tile. Most rows of a large vocabulary have few in a batch."""
CHUNK = 128
"""Tokens of one id that are summed apart."""
BLOCK_C = 256
"""Columns of a program: one warp, so that a thread sums over tokens alone."""


@triton.jit
def _gather_kernel(table_ptr, ids_ptr, out_ptr, C, BLOCK: tl.constexpr):
    """One token's row, in the dtype of ``out``."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    at = table_ptr + tl.load(ids_ptr + row) * C + columns
    x = tl.load(at, mask=columns < C, other=0.0)
    tl.store(out_ptr + row * C + columns, x.to(out_ptr.dtype.element_ty), mask=columns < C)


def gather(table: Tensor, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """``[..., C]`` of ``dtype``: rows of ``table [V, C]`` by ``ids [...]`` int64."""
    C = table.size(1)
    assert table.is_contiguous()
    assert ids.is_contiguous()
    out = torch.empty((*ids.shape, C), dtype=dtype, device=ids.device)
    if ids.numel():
        block = triton.next_power_of_2(C)
        _gather_kernel[(ids.numel(),)](
            table, ids, out, C, BLOCK=block, num_warps=max(1, min(8, block // 512))
        )
    return out


@triton.jit
def _sum_rows(
    rows_ptr, index_ptr, first, last, sums, columns, C,
    HAS_INDEX: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``sums`` plus the rows ``first`` to ``last``, or those that the index has there."""
    for at in range(first, last, BLOCK_N):
        row = (at + tl.arange(0, BLOCK_N)).to(tl.int64)
        inside = row < last
        if HAS_INDEX:
            row = tl.load(index_ptr + row, mask=inside, other=0)
        mask = inside[:, None] & (columns < C)[None, :]
        values = tl.load(rows_ptr + row[:, None] * C + columns[None, :], mask=mask, other=0.0)
        sums += tl.sum(values.to(tl.float32), axis=0)
    return sums


@triton.jit
def _sum_chunk_kernel(
    grad_ptr, tokens_ptr, ids_ptr, out_ptr, C,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Of each whole chunk of the sorted positions that has one token id alone: the sum."""
    chunk = tl.program_id(0)
    first = chunk * CHUNK
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    ends = tl.load(tokens_ptr + first), tl.load(tokens_ptr + first + CHUNK - 1)
    if tl.load(ids_ptr + ends[0]) == tl.load(ids_ptr + ends[1]):
        sums = tl.zeros((BLOCK_C,), tl.float32)
        sums = _sum_rows(
            grad_ptr, tokens_ptr, first, first + CHUNK, sums, columns, C, True, BLOCK_N
        )
        tl.store(out_ptr + chunk.to(tl.int64) * C + columns, sums, mask=columns < C)


@triton.jit
def _sum_by_token_kernel(
    grad_ptr, tokens_ptr, starts_ptr, chunks_ptr, out_ptr, C,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One row of the table, BLOCK_C columns of it: its tokens in order of their positions."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, last = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    first_chunk, last_chunk = tl.cdiv(first, CHUNK), last // CHUNK
    # Without a whole chunk all tokens are before it.
    before = tl.where(first_chunk < last_chunk, first_chunk * CHUNK, last)
    after = tl.where(first_chunk < last_chunk, last_chunk * CHUNK, last)
    sums = tl.zeros((BLOCK_C,), tl.float32)
    sums = _sum_rows(grad_ptr, tokens_ptr, first, before, sums, columns, C, True, BLOCK_N)
    sums = _sum_rows(
        chunks_ptr, tokens_ptr, first_chunk, last_chunk, sums, columns, C, False, BLOCK_N
    )
    sums = _sum_rows(grad_ptr, tokens_ptr, after, last, sums, columns, C, True, BLOCK_N)
    tl.store(out_ptr + row * C + columns, sums.to(out_ptr.dtype.element_ty), mask=columns < C)


def sum_by_token(
    grad: Tensor, ids: Tensor, tokens: Tensor, starts: Tensor, dtype: torch.dtype
) -> Tensor:
    """``[V, C]`` of ``dtype``: row v is the float32 sum of ``grad [N, C]`` over the tokens
    ``tokens[starts[v] : starts[v + 1]]`` (int64), whose ``ids`` (int64 ``[N]``) are v.

    A frequent token would keep one program busy when all others have ended: its whole chunks are
    summed by programs of their own.
    """
    assert grad.is_contiguous()
    assert ids.is_contiguous()
    (N, C), vocab = grad.shape, starts.numel() - 1
    out = torch.empty((vocab, C), dtype=dtype, device=grad.device)
    chunks = torch.empty((N // CHUNK, C), dtype=torch.float32, device=grad.device)
    block = min(BLOCK_C, triton.next_power_of_2(C))
    sizes: dict[str, int] = {"CHUNK": CHUNK, "BLOCK_N": BLOCK_N, "BLOCK_C": block}
    if len(chunks):
        grid = len(chunks), triton.cdiv(C, block)
        _sum_chunk_kernel[grid](grad, tokens, ids, chunks, C, **sizes, num_warps=1)
    _sum_by_token_kernel[(vocab, triton.cdiv(C, block))](
        grad, tokens, starts, chunks, out, C, **sizes, num_warps=1
    )
    return out
