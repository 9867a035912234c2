"""The flat buffers of a group of parameters, and the buckets that their gradients travel in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import assert_never

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat_ray.optim.groups import Group
from nanochat_ray.optim.muon import MuonRule, muon_update_

BUCKET = 1 << 18
"""Elements that one reduction of a Muon group carries, at least: small ones cost latency."""


@dataclass(frozen=True)
class Span:
    """The range of one parameter in its group's buffer, in elements."""

    name: str
    shape: torch.Size
    start: int
    stop: int


@dataclass
class Bucket:
    """A run of a group's gradients that is reduced by one call."""

    flat: FlatGroup
    start: int
    stop: int
    owner: int
    """The rank that updates it; -1 if it is split over all of them."""
    parameters: int
    missing: int = 0
    """Parameters whose gradient is still to come in this backward pass."""
    work: dist.Work | None = None
    in_flight: bool = False


class FlatGroup:
    """One group's buffers. ``weights`` and ``grads`` are whole, the rest is this rank's share.

    Each of the first ``owners`` ranks has a share, of ``share`` elements. These are all ranks, and
    the buffers are padded to a multiple of them, unless there are fewer matrices than ranks: padded
    to 256 ranks, those of a model of 20 layers would be 3.4 times as large as the model.
    """

    def __init__(
        self,
        group: Group,
        parameters: Mapping[str, nn.Parameter],
        rank: int,
        world: int,
        rule: MuonRule = MuonRule(),  # noqa: B008 (frozen)
    ):
        self.group, self.rule = group, rule
        members = [parameters[name] for name in group.names]
        self.spans: list[Span] = []
        at = 0
        for name, parameter in zip(group.names, members, strict=True):
            self.spans.append(Span(name, parameter.shape, at, at + parameter.numel()))
            at += parameter.numel()
        self.unit_shape = () if group.is_elementwise else tuple(members[0].shape)
        """Of what one rank updates: a matrix, or an element."""
        unit = math.prod(self.unit_shape)
        self.share = -(-(at // unit) // world) * unit
        self.owners = world if group.is_elementwise else min(world, at // unit)
        size = self.share * self.owners
        self.own_share = slice(*(min(r * self.share, size) for r in (rank, rank + 1)))
        device = members[0].device
        self.weights = torch.zeros(size, device=device)
        self.grads = torch.zeros(size, device=device)
        for span, parameter in zip(self.spans, members, strict=True):
            view = self.weights[span.start : span.stop].view(span.shape)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad = self.grads[span.start : span.stop].view(span.shape)
        self.state_shapes = group.state_shapes(self.unit_shape)
        self.state_shares = {
            kind: self.share // unit * math.prod(shape) for kind, shape in self.state_shapes.items()
        }
        """Elements of each kind of state that an owner has."""
        self.is_owner = rank < self.owners
        self.state = {
            kind: torch.zeros(share if self.is_owner else 0, device=device)
            for kind, share in self.state_shares.items()
        }

    def buckets(self) -> list[Bucket]:
        """The group's gradients in reductions, none of which crosses the share of a rank."""
        if self.group.is_elementwise:
            return [Bucket(self, 0, self.grads.numel(), -1, len(self.spans))]
        buckets: list[Bucket] = []
        for span in self.spans:
            last = buckets[-1] if buckets else None
            owner = span.start // self.share
            if last and last.owner == owner and last.stop - last.start < BUCKET:
                last.stop, last.parameters = span.stop, last.parameters + 1
            else:
                buckets.append(Bucket(self, span.start, span.stop, owner, 1))
        return buckets

    def state_sizes(self, span: Span) -> dict[str, tuple[int, int, tuple[int, ...]]]:
        """For each kind of state: the parameter's range in the whole, and its shape."""
        if self.group.is_elementwise:
            return dict.fromkeys(self.state, (span.start, span.stop, tuple(span.shape)))
        index = span.start // math.prod(self.unit_shape)
        return {
            kind: (index * math.prod(shape), (index + 1) * math.prod(shape), shape)
            for kind, shape in self.state_shapes.items()
        }

    def buffers(self) -> tuple[Tensor, ...]:
        """This rank's weights, gradients and state in the order of ``Group.state_shapes``, as the
        update takes them: ``[K, m, n]`` for K matrices, else flat."""
        weights, grads = (t[self.own_share] for t in (self.weights, self.grads))
        state = (self.state[kind].view(-1, *shape) for kind, shape in self.state_shapes.items())
        return (*(t.view(-1, *self.unit_shape) for t in (weights, grads)), *state)

    @torch.no_grad()
    def update(
        self, step: int, lr_factor: float, momentum: float, dtype: torch.dtype = torch.float32
    ) -> None:
        """Updates this rank's weights from its reduced gradients."""
        if not self.is_owner:
            return
        group, lr = self.group, self.group.lr * lr_factor
        if group.kind == "muon":
            weights, grads, first, second = self.buffers()
            muon_update_(
                *(weights, grads, first, second),
                lr=lr,
                momentum=momentum,
                beta2=group.beta2,
                weight_decay=group.weight_decay * lr_factor,
                rule=self.rule,
                dtype=dtype,
            )
        elif group.kind == "adamw":
            # Loshchilov and Hutter, arXiv 1711.05101.
            weights, grads, first, second = self.buffers()
            weights.mul_(1 - lr * group.weight_decay)
            first.lerp_(grads, 1 - group.beta1)
            second.mul_(group.beta2).addcmul_(grads, grads, value=1 - group.beta2)
            correction1 = 1 - group.beta1 ** (step + 1)
            correction2 = 1 - group.beta2 ** (step + 1)
            denominator = second.sqrt().div_(correction2**0.5).add_(group.eps)
            weights.addcdiv_(first, denominator, value=-lr / correction1)
        else:
            assert_never(group.kind)
