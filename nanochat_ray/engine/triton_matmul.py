"""Matmuls in Triton: one whose rows do not depend on their number, and one for a few rows.

cuBLAS chooses a kernel by the size of a batch, and kernels sum in different orders, so that a
token's logits depend on what else the batch has. In ``matmul`` every program computes a tile of one
size with one instruction and sums over K from the first to the last, whatever M is. The price: a
few rows take as long as BLOCK_M, and no size of tile suits all shapes.

``multiply_few`` reads the weights with all of the GPU's processors, where cuBLAS has tiles that few
of them share (BENCHMARKS.md).

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


FEW_ROWS = 4
ELEMENTS = 4096
"""Weights of a tile: 32 for each thread, which it reads at one time."""


@triton.jit
def _multiply_few_kernel(
    x_ptr, weight_ptr, out_ptr, N, x_stride, weight_stride, out_stride,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_N outputs of one row."""
    row = tl.program_id(1)
    outputs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inputs = tl.arange(0, BLOCK_K)
    weight_rows = weight_ptr + outputs.to(tl.int64)[:, None] * weight_stride
    sums = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        k = start + inputs
        x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        mask = (outputs < N)[:, None] & (k < K)[None, :]
        weight = tl.load(weight_rows + k[None, :], mask=mask, other=0.0).to(tl.float32)
        sums += weight * x[None, :]
    y = tl.sum(sums, axis=1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * out_stride + outputs, y, mask=outputs < N)


def multiply_few(x: Tensor, weight: Tensor) -> Tensor:
    """``matmul`` for at most ``FEW_ROWS`` rows, with other bits than it has."""
    (M, K), N = x.shape, weight.size(0)
    assert x.stride(1) == weight.stride(1) == 1
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    block_n = 4 if K <= 2048 else 8  # of 4 to 32 the fastest
    if M:
        _multiply_few_kernel[(triton.cdiv(N, block_n), M)](
            *(x, weight, out, N, x.stride(0), weight.stride(0), out.stride(0)),
            K=K,
            BLOCK_N=block_n,
            BLOCK_K=min(ELEMENTS // block_n, triton.next_power_of_2(K)),
            num_warps=4,
        )
    return out
