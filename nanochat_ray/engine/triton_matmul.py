"""A matmul whose rows do not depend on the number of rows, in Triton.

cuBLAS chooses a kernel by the size of a batch, and kernels sum in different orders, so that a
token's logits depend on what else the batch has. Here every program computes a tile of one size
with one instruction and sums over K from the first to the last, whatever M is. The price: a few
rows take as long as BLOCK_M, and no size of tile suits all shapes.

Legend: M rows of x, N outputs, K inputs.
"""

# Triton resolves every name in a kernel's signature: it can have no annotations but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_M, BLOCK_N, BLOCK_K = 64, 64, 64


@triton.jit
def _matmul_kernel(
    x_ptr, weight_ptr, out_ptr, M, N, K, x_stride, weight_stride, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of ``out [M, N]`` = ``x [M, K]`` · ``weight [N, K]``ᵀ."""
    # Neighbouring programs read the same weights, which are larger than x in most steps.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * x_stride
    weight_rows = weight_ptr + columns.to(tl.int64)[None, :] * weight_stride
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + inputs
        x = tl.load(x_rows + k[None, :], mask=(rows < M)[:, None] & (k < K)[None, :], other=0.0)
        mask = (columns < N)[None, :] & (k < K)[:, None]
        weight = tl.load(weight_rows + k[:, None], mask=mask, other=0.0)
        sums = tl.dot(x, weight, sums, input_precision="ieee")
    out = out_ptr + rows.to(tl.int64)[:, None] * out_stride + columns[None, :]
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=inside)


def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """``[M, N]``: ``x [M, K]`` · ``weight [N, K]``ᵀ in their dtype, summed in float32. The bits of
    a row depend on that row of ``x`` and the weight alone."""
    (M, K), N = x.shape, weight.size(0)
    assert x.stride(1) == weight.stride(1) == 1
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if M:
        _matmul_kernel[(triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N))](
            *(x, weight, out, M, N, K, x.stride(0), weight.stride(0), out.stride(0)),
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            num_warps=4,
            num_stages=4,
        )
    return out
