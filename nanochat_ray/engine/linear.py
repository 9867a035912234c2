"""Linear layers laid out for decoding on a CPU: the same bits for a row whatever the batch.

A row must not depend on the rows beside it, or answers would depend on who else is served. MKL
keeps to that from two rows on if a matrix is stored column by column; stored row by row, results
change at 16 rows. A few rows wait for memory: for them the columns are kept in blocks of 32, which
one batched product reads from front to back, 1.2 to 1.7 times faster than columns as long as the
matrix. More rows wait for the processor: for them MKL packs the matrix in an order of its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_ray.engine.native import Native, Norm, ReluSquared, Softcap, Turn
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.layers import Linear

BLOCK_COLUMNS = 32
BLOCKED_ROWS = 32
"""Up to so many rows, blocks are faster (``jobs/bench_offline.py``, 2026-11-21)."""
FEWEST_ROWS = (2, 4)
"""One row has a kernel of its own everywhere, up to three have one on some processors."""
CHECKED_ROWS = (2, 3, 4, 5, 7, 16, 32, 33, 65)


class Gate(nn.Module):
    """A linear layer of few outputs, computed as one of more.

    A matrix of one row has kernels of its own, whose sums depend on the number of rows of ``x``.
    And a slice of a wider result is not contiguous: a contiguous one would go through torch's
    sigmoid by vectors of 16 with another formula for what is left over, so that a row's gate
    would depend on its place in the batch.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        wide = torch.zeros(layer.out_features // 8 * 8 + 8, layer.in_features)
        wide = wide.to(layer.weight.device, layer.weight.dtype)
        wide[: layer.out_features] = layer.weight.data
        self.weight = nn.Parameter(by_columns(wide), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)[..., : self.out_features]


class Blocked(nn.Module):
    """A linear layer without bias over float32 ``weight [N, K]``, for 2 rows or more."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        rest = -self.out_features % BLOCK_COLUMNS
        blocks = F.pad(weight, (0, 0, 0, rest)).unflatten(0, (-1, BLOCK_COLUMNS))
        self.blocks = blocks.transpose(1, 2).contiguous()  # [N / 32, K, 32]
        # Packed for one row: MKL promises nothing for other numbers, ``fewest_rows`` looks.
        self.packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.contiguous(), 1)
        # The operator wants the plain weights too, and reads nothing of them but their shape.
        self.shape = torch.empty(1).expand(weight.shape)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.numel() // self.in_features
        if rows > BLOCKED_ROWS:
            return torch.ops.mkl._mkl_linear(x, self.packed, self.shape, None, rows)
        count = self.blocks.size(0)
        y_bMn = torch.bmm(x.reshape(rows, -1).expand(count, -1, -1), self.blocks)
        y = y_bMn.transpose(0, 1).reshape(*x.shape[:-1], -1)
        return y[..., : self.out_features]


def by_columns(weight: Tensor) -> Tensor:
    """The same values ``[N, K]``, those of a column next to each other in memory."""
    return weight.t().contiguous().t()


@torch.inference_mode()
def fewest_rows(layer: nn.Linear | Gate | Blocked, dtype: torch.dtype) -> int | None:
    """The number of rows from which on a row's result does not depend on it, as far as a trial
    shows; None if it always may."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn((300, layer.in_features), generator=noise).to(dtype)
    whole = layer(x)
    wrong = [n for n in CHECKED_ROWS if not torch.equal(layer(x[:n]), whole[:n])]
    return next((n for n in FEWEST_ROWS if not wrong or n > wrong[-1]), None)


def faster(layer: nn.Linear) -> nn.Linear | Gate | Blocked:
    """A layer that computes the same."""
    weight = layer.weight.data
    if layer.out_features < BLOCK_COLUMNS:
        return Gate(layer)
    if weight.dtype == torch.float32 and torch.backends.mkl.is_available():
        blocked = Blocked(weight)
        if fewest_rows(blocked, weight.dtype):
            return blocked
    layer.weight.data = by_columns(weight)
    return layer


@torch.inference_mode()
def lay_out(model: GPT, native: Native | None = None) -> int:
    """Replaces or rearranges the model's layers; what they compute stays.

    Returns how many rows a forward must have at least for rows not to depend on each other.
    """
    if native is not None:
        model.norm = Norm(native, model.config.norm_eps)
        model.softcap = Softcap(native, model.config.softcap)
    for block in model.blocks:
        attn = block.attn
        if attn.c_qkv is None:
            parts = [attn.c_q, attn.c_k, attn.c_v]
            whole = Linear(attn.c_q.in_features, sum(p.out_features for p in parts))
            whole.weight.data = torch.cat([p.weight.data for p in parts])
            attn.c_qkv = whole
            del attn.c_q, attn.c_k, attn.c_v
        if native is not None:
            attn.turn, block.mlp.activation = Turn(native), ReluSquared(native)
    needed = 1
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            replacement = faster(layer) if isinstance(layer, nn.Linear) else layer
            setattr(parent, name, replacement)
            if isinstance(replacement, nn.Linear | Gate | Blocked):
                rows = fewest_rows(replacement, model.compute_dtype)
                needed = max(needed, rows or FEWEST_ROWS[-1])
    return needed
