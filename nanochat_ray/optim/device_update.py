"""The update on a GPU: few kernels, and no wait for the device.

On a CPU the host looks at the gradient norm and then decides (``sharded.py``). A GPU would stand
still meanwhile. Here the decision is a number on the device: where the norm is not finite, the
gradient is replaced by zeros and every rate by zero, which leaves weights and state as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from nanochat_ray import machine
from nanochat_ray.optim.flat import FlatGroup
from nanochat_ray.optim.muon import MuonRule, muon_update_


class _Rates(NamedTuple):
    """0-d float32 tensors on the device."""

    active: Tensor
    """1, or 0 if the step changes nothing."""
    grad_factor: Tensor
    lr_factor: Tensor
    momentum: Tensor


def _muon_update_(
    weights: Tensor,
    grads: Tensor,
    first: Tensor,
    second: Tensor,
    rates: _Rates,
    lr: float,
    beta2: float,
    weight_decay: float,
    rule: MuonRule,
    dtype: torch.dtype,
) -> None:
    """``muon_update_`` with the gradient times its factor; without effect if not active."""
    active = rates.active
    grads = torch.where(active > 0, grads * rates.grad_factor, 0.0)
    muon_update_(
        *(weights, grads, first, second),
        lr=lr * rates.lr_factor * active,
        momentum=1 - (1 - rates.momentum) * active,
        beta2=1 - (1 - beta2) * active,
        weight_decay=weight_decay * rates.lr_factor if weight_decay else 0.0,
        rule=rule,
        dtype=dtype,
    )


class DeviceUpdate:
    """Applies one step after another: ``start``, then ``apply`` to each group."""

    def __init__(self, compiles: bool):
        self._muon_update_ = (
            torch.compile(_muon_update_, dynamic=False) if compiles else _muon_update_
        )

    @staticmethod
    def squares(flats: Sequence[FlatGroup]) -> Tensor:
        """The sum of squares of this rank's gradients, 0-d float32."""
        norms = torch._foreach_norm([flat.grads[flat.own_share] for flat in flats])
        return torch.stack(norms).square().sum()

    def start(
        self,
        step: int,
        norm: Tensor,
        lr_factor: float,
        momentum: float,
        scale: float | Tensor,
        clip: float,
        active: bool | Tensor,
    ) -> None:
        """What all groups share. ``norm`` is that of the scaled gradient; the other arguments are
        those of ``ShardedOptimizer.step``."""
        device = norm.device
        factors = machine.send(torch.tensor([step + 1.0, lr_factor, momentum]), device)
        self._step, lr_factors, momenta = factors.unbind()
        is_active = norm.isfinite() & active
        factor = torch.ones((), device=device) * scale
        if clip > 0:
            factor = factor * (clip / norm).clamp_max(1.0)
        self._lr_factor = lr_factor
        self._rates = _Rates(is_active.float(), factor.float(), lr_factors, momenta)
        # What torch's fused AdamW takes: it divides gradients, and skips where this is not 0.
        self._grad_scale, self._skip = 1 / self._rates.grad_factor, 1 - self._rates.active

    @torch.no_grad()
    def apply(self, flat: FlatGroup, dtype: torch.dtype) -> None:
        """Updates this rank's weights of a group; ``dtype`` is that of Muon's iteration."""
        group = flat.group
        if not flat.is_owner:
            return
        if group.kind == "muon":
            weights, grads, first, second = flat.buffers()
            self._muon_update_(
                *(weights, grads, first, second),
                self._rates,
                group.lr,
                group.beta2,
                group.weight_decay,
                flat.rule,
                dtype,
            )
        elif group.kind == "adamw":
            weights, grads, first, second = flat.buffers()
            torch._fused_adamw_(
                *([weights], [grads], [first], [second]),
                [],
                [self._step],
                lr=group.lr * self._lr_factor,
                beta1=group.beta1,
                beta2=group.beta2,
                weight_decay=group.weight_decay,
                eps=group.eps,
                amsgrad=False,
                maximize=False,
                grad_scale=self._grad_scale,
                found_inf=self._skip,
            )
        else:
            assert_never(group.kind)
