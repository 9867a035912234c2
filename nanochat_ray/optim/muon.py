"""Muon: momentum whose update is the nearest semi-orthogonal matrix, for stacks of matrices.

Keller Jordan, "Muon: an optimizer for hidden layers", 2024. Around it, each to be turned off: rows
of equal norm before the iteration (MuonEq, arXiv 2603.28254), Polar Express in place of
Newton-Schulz (Amsel, Persson, Musco, Gower, arXiv 2505.16932), the update of each neuron rescaled
by a running second moment (NorMuon, Li et al., arXiv 2510.05491), and weight decay only where it
agrees with the update (cautious decay, Chen et al., arXiv 2510.12402). What each gives is in
BENCHMARKS.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_ray.optim.config import Orthogonalizer

# Five quintic steps, each optimal for the interval that the one before leaves: the paper's
# published triples for a lower bound of 1e-3, with the safety factor 1.02 folded in.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
# Jordan's quintic, the same at each step: steepest at zero, and not quite convergent.
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5


@dataclass(frozen=True, kw_only=True)
class MuonRule:
    """What surrounds the momentum; the fields of ``OptimConfig``."""

    orthogonalizer: Orthogonalizer = "polar_express"
    normuon: bool = True
    row_normalize: bool = False
    cautious: bool = False


def orthogonalize(G: Tensor, method: Orthogonalizer = "polar_express") -> Tensor:
    """The semi-orthogonal factor of each matrix of ``G [..., m, n]``, approximately.

    Singular values go to about 1: to a few per cent with Polar Express, to 0.7 to 1.2 with
    Newton-Schulz; those below a thousandth of the norm stay smaller. Works in the dtype of
    ``G``; both iterations are stable in bfloat16.
    """
    polar = method == "polar_express"
    X = G if G.size(-2) <= G.size(-1) else G.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * (1.02 if polar else 1.0) + 1e-7)
    for a, b, c in POLAR_EXPRESS if polar else NEWTON_SCHULZ:
        A = X @ X.mT
        B = torch.baddbmm(A, A, A, beta=b, alpha=c) if A.ndim == 3 else b * A + c * (A @ A)
        X = torch.baddbmm(X, B, X, beta=a) if X.ndim == 3 else a * X + B @ X
    return X if G.size(-2) <= G.size(-1) else X.mT


def muon_update_(
    weights: Tensor,
    grads: Tensor,
    momentum_buffer: Tensor,
    second_moment: Tensor,
    *,
    lr: float | Tensor,
    momentum: float | Tensor,
    beta2: float | Tensor,
    weight_decay: float | Tensor,
    rule: MuonRule = MuonRule(),
    dtype: torch.dtype = torch.float32,
) -> None:
    """One step on a stack of matrices, in place. Numbers may be 0-d tensors, but for a
    ``weight_decay`` of 0.

    ``weights``, ``grads`` and ``momentum_buffer`` are ``[K, m, n]`` float32, ``second_moment`` is
    ``[K, m, 1]`` (or ``[K, 1, n]`` for wide matrices) float32. The step of an m×n matrix is
    ``lr * sqrt(max(1, m / n))`` times a matrix of spectral norm about 1. ``dtype`` is that of the
    orthogonalisation, which is nearly all of the work.
    """
    momentum_buffer.lerp_(grads, 1 - momentum)
    update = grads.lerp(momentum_buffer, momentum)
    if rule.row_normalize:
        # The iteration reaches small singular values late: unequal rows would leave more of them.
        update /= update.norm(dim=-1, keepdim=True).clamp_min(1e-20)
    update = orthogonalize(update.to(dtype), rule.orthogonalizer).float()
    if rule.normuon:
        # Even out the neurons, keep the norm of the whole.
        along = -1 if update.size(-2) >= update.size(-1) else -2
        mean_square = update.square().mean(dim=along, keepdim=True)
        second_moment.lerp_(mean_square, 1 - beta2)
        scale = second_moment.clamp_min(1e-10).rsqrt()
        before = mean_square.sum(dim=(-2, -1), keepdim=True)
        after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True)
        update *= scale * (before / after.clamp_min(1e-20)).sqrt()

    lr = lr * max(1.0, weights.size(-2) / weights.size(-1)) ** 0.5
    if isinstance(weight_decay, Tensor) or weight_decay:
        decay = weights * ((update * weights) > 0) if rule.cautious else weights
        _subtract_(weights, decay, lr * weight_decay)
    _subtract_(weights, update, lr)


def _subtract_(weights: Tensor, update: Tensor, lr: float | Tensor) -> None:
    """``weights -= lr * update``."""
    if isinstance(lr, Tensor):
        weights.sub_(update * lr)
    else:
        weights.sub_(update, alpha=lr)
