"""Linear layers laid out for decoding on a CPU: a row should not depend on the rows beside it.

Ours in C have the same bits for a row whatever the batch, by how they are made (``linear.c``).
Where there are none, Intel's MKL has them from two rows on if a matrix is stored column by column
(stored row by row, results change at 16 rows), as far as a trial at the start shows; on other CPUs
rounding may depend on the batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_ray.engine.native import Native, Norm, Product, ReluSquared, Softcap, Turn
from nanochat_ray.machine import zeros
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.layers import Linear

GATE_OUTPUTS = 32
"""A layer of fewer is computed as one of more."""
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


def by_columns(weight: Tensor) -> Tensor:
    """The same values ``[N, K]``, those of a column next to each other in memory."""
    return weight.t().contiguous().t()


@torch.inference_mode()
def fewest_rows(layer: nn.Linear | Gate, dtype: torch.dtype) -> int | None:
    """The number of rows from which on a row's result does not depend on it, as far as a trial
    shows; None if it always may."""
    noise = torch.Generator().manual_seed(0)
    x = torch.randn((300, layer.in_features), generator=noise).to(dtype)
    whole = layer(x)
    wrong = [n for n in CHECKED_ROWS if not torch.equal(layer(x[:n]), whole[:n])]
    return next((n for n in FEWEST_ROWS if not wrong or n > wrong[-1]), None)


def faster(layer: nn.Linear) -> nn.Linear | Gate:
    """A layer of torch's that computes the same."""
    if layer.out_features < GATE_OUTPUTS:
        return Gate(layer)
    layer.weight.data = by_columns(layer.weight.data)
    return layer


@torch.inference_mode()
def pack_weights(model: GPT, native: Native | None = None) -> int:
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
    places = [
        (parent, name)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]
    if native is not None:
        # One stretch of large pages, to which the weights go one by one: never all twice in memory.
        rooms = [Product.room(getattr(*place).weight) for place in places]
        memory = zeros([sum(rooms)], torch.float32, torch.device("cpu"), now=False)
        for (parent, name), part in zip(places, memory.split(rooms), strict=True):
            setattr(parent, name, Product(native, getattr(parent, name).weight.data, part))
        return 1
    needed = 1
    for parent, name in places:
        layer = faster(getattr(parent, name))
        setattr(parent, name, layer)
        rows = fewest_rows(layer, model.compute_dtype)
        needed = max(needed, rows or FEWEST_ROWS[-1])
    return needed
