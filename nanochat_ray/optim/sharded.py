"""The optimizer: Muon and AdamW over flat buffers, each worker updating its share.

Parameters and gradients live in flat float32 buffers, one for each group; the tensors of the
model are views into them. A step is then, for each group,

    reduce the gradients → update the slice that this rank owns → gather the weights,

which is ZeRO stage 2 (Rajbhandari et al., arXiv 1910.02054) with no copies: the state exists once
over all ranks. A Muon group is a stack ``[K, m, n]`` split between matrices; an AdamW group is
split anywhere, since AdamW works on single elements. A reduction starts as soon as the backward
pass has produced all gradients of its bucket, and each gather overlaps with the next update.

State is saved and loaded by parameter name with full tensors, so it does not depend on the number
of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.groups import Group, build_groups
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
    """One group's buffers. ``weights`` and ``grads`` are whole, the rest is this rank's share."""

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
        unit = members[0].numel() if group.kind == "muon" else 1
        share = -(-(at // unit) // world) * unit
        self.own_share = slice(rank * share, (rank + 1) * share)
        device = members[0].device
        self.weights = torch.zeros(share * world, device=device)
        self.grads = torch.zeros(share * world, device=device)
        for span, parameter in zip(self.spans, members, strict=True):
            view = self.weights[span.start : span.stop].view(span.shape)
            view.copy_(parameter.data)
            parameter.data = view
            parameter.grad = self.grads[span.start : span.stop].view(span.shape)
        self.state = {"momentum": torch.zeros(share, device=device)}
        if group.kind == "adamw":
            self.state["second_moment"] = torch.zeros(share, device=device)
        else:
            m, n = members[0].shape
            self.matrix_shape = (m, n)
            self.second_shape = (m, 1) if m >= n else (1, n)
            self.state["second_moment"] = torch.zeros(share // unit * max(m, n), device=device)

    def buckets(self) -> list[Bucket]:
        """The group's gradients in reductions, none of which crosses the share of a rank."""
        if self.group.kind == "adamw":
            return [Bucket(self, 0, self.grads.numel(), -1, len(self.spans))]
        share = self.own_share.stop - self.own_share.start
        buckets: list[Bucket] = []
        for span in self.spans:
            last = buckets[-1] if buckets else None
            owner = span.start // share
            if last and last.owner == owner and last.stop - last.start < BUCKET:
                last.stop, last.parameters = span.stop, last.parameters + 1
            else:
                buckets.append(Bucket(self, span.start, span.stop, owner, 1))
        return buckets

    def state_sizes(self, span: Span) -> dict[str, tuple[int, int, tuple[int, ...]]]:
        """For each kind of state: the parameter's range in the whole, and its shape."""
        if self.group.kind == "adamw":
            return dict.fromkeys(self.state, (span.start, span.stop, tuple(span.shape)))
        index = span.start // (self.matrix_shape[0] * self.matrix_shape[1])
        width = max(self.matrix_shape)
        return {
            "momentum": (span.start, span.stop, tuple(span.shape)),
            "second_moment": (index * width, (index + 1) * width, self.second_shape),
        }

    @torch.no_grad()
    def update(
        self, step: int, lr_factor: float, momentum: float, dtype: torch.dtype = torch.float32
    ) -> None:
        """Updates this rank's weights from its reduced gradients."""
        group, lr = self.group, self.group.lr * lr_factor
        weights, grads = self.weights[self.own_share], self.grads[self.own_share]
        first, second = self.state["momentum"], self.state["second_moment"]
        if group.kind == "muon":
            muon_update_(
                weights.view(-1, *self.matrix_shape),
                grads.view(-1, *self.matrix_shape),
                first.view(-1, *self.matrix_shape),
                second.view(-1, *self.second_shape),
                lr=lr,
                momentum=momentum,
                beta2=group.beta2,
                weight_decay=group.weight_decay * lr_factor,
                rule=self.rule,
                dtype=dtype,
            )
            return
        # AdamW: Loshchilov and Hutter, arXiv 1711.05101.
        weights.mul_(1 - lr * group.weight_decay)
        first.lerp_(grads, 1 - group.beta1)
        second.mul_(group.beta2).addcmul_(grads, grads, value=1 - group.beta2)
        correction1 = 1 - group.beta1 ** (step + 1)
        correction2 = 1 - group.beta2 ** (step + 1)
        denominator = second.sqrt().div_(correction2**0.5).add_(group.eps)
        weights.addcdiv_(first, denominator, value=-lr / correction1)


class ShardedOptimizer:
    """Muon and AdamW for a model whose ranks hold equal weights.

    After construction the model's parameters are views into flat buffers and their gradients are
    allocated: call ``zero_grad`` of this class, never ``set_to_none``. With an initialised
    process group of more than one rank every method is collective. ``compute_dtype`` is that of
    Muon's orthogonalisation; weights and state are float32.
    """

    def __init__(
        self, model: nn.Module, config: OptimConfig, compute_dtype: torch.dtype = torch.float32
    ):
        in_group = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if in_group else 0
        self.world = dist.get_world_size() if in_group else 1
        self.compute_dtype = compute_dtype
        self._scatters = in_group and dist.get_backend() == "nccl"
        parameters = dict(model.named_parameters())
        groups = build_groups(parameters.items(), config)
        rule = MuonRule(
            orthogonalizer=config.orthogonalizer,
            normuon=config.normuon,
            row_normalize=config.row_normalize,
            cautious=config.cautious,
        )
        self.flats = [FlatGroup(group, parameters, self.rank, self.world, rule) for group in groups]
        self._buckets: list[Bucket] = []
        self._last_backward = False
        if self.world > 1:
            for flat in self.flats:
                dist.broadcast(flat.weights, src=0)
                for bucket in flat.buckets():
                    self._buckets.append(bucket)
                    for span in flat.spans:
                        if bucket.start <= span.start < bucket.stop:
                            parameters[span.name].register_post_accumulate_grad_hook(
                                self._hook(bucket)
                            )

    def zero_grad(self) -> None:
        self._last_backward = False
        for flat in self.flats:
            flat.grads.zero_()

    def last_backward(self) -> None:
        """Marks the next backward pass as the step's last: reductions start within it.

        Every rank's backward pass makes its gradients in the same order, hence so do these.
        """
        self._last_backward = True
        for bucket in self._buckets:
            bucket.missing, bucket.in_flight, bucket.work = bucket.parameters, False, None

    def _hook(self, bucket: Bucket) -> Callable[[Tensor], None]:
        def on_gradient(_: Tensor) -> None:
            bucket.missing -= 1
            if self._last_backward and bucket.missing == 0:
                self._launch(bucket)

        return on_gradient

    def _launch(self, bucket: Bucket) -> None:
        flat, bucket.in_flight = bucket.flat, True
        grads = flat.grads[bucket.start : bucket.stop]
        if not self._scatters:
            # gloo's reduce-scatter took 3 to 8 times as long as its all-reduce (1 to 4 M
            # elements).
            bucket.work = dist.all_reduce(grads, async_op=True)
        elif bucket.owner >= 0:
            bucket.work = dist.reduce(grads, dst=bucket.owner, async_op=True)
        else:
            share = flat.grads[flat.own_share]
            bucket.work = dist.reduce_scatter_single(share, grads, async_op=True)

    def _finish_reductions(self) -> None:
        """Waits for all reductions; starts those that no backward pass has started."""
        if not self._last_backward:
            self.last_backward()
        for bucket in self._buckets:
            if not bucket.in_flight:
                self._launch(bucket)
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
        self._last_backward = False

    @torch.no_grad()
    def step(
        self,
        step: int,
        *,
        lr_factor: float,
        momentum: float,
        scale: float | Tensor = 1.0,
        clip: float = 0.0,
    ) -> Tensor:
        """One step; returns the global gradient norm (0-d tensor) after scaling, before clipping.

        Gradients are summed over ranks and multiplied by ``scale``. If the norm is not finite,
        weights and state stay untouched on every rank.
        """
        self._finish_reductions()
        squares = torch.zeros((), device=self.flats[0].weights.device)
        for flat in self.flats:
            share = flat.grads[flat.own_share]
            squares += share.mul_(scale).square().sum()
        if self.world > 1:
            dist.all_reduce(squares)
        norm = squares.sqrt()
        if not torch.isfinite(norm):
            return norm
        if clip > 0 and norm > clip:
            for flat in self.flats:
                flat.grads[flat.own_share].mul_(clip / norm)
        gathers = []
        for flat in self.flats:
            flat.update(step, lr_factor, momentum, self.compute_dtype)
            if self.world > 1:
                share = flat.weights[flat.own_share]
                source = share if self._scatters else share.clone()
                gathers.append(dist.all_gather_single(flat.weights, source, async_op=True))
        for work in gathers:
            if work is not None:
                work.wait()
        return norm

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """``{"<parameter>/<kind>": full tensor}`` in host memory; the same on every rank."""
        tensors: dict[str, Tensor] = {}
        for flat in self.flats:
            for kind, share in flat.state.items():
                whole = share
                if self.world > 1:
                    whole = share.new_empty(share.numel() * self.world)
                    dist.all_gather_single(whole, share)
                for span in flat.spans:
                    start, stop, shape = flat.state_sizes(span)[kind]
                    view = whole[start:stop].view(shape)
                    tensors[f"{span.name}/{kind}"] = view.to("cpu", copy=True)
        return tensors

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads what ``state_dict`` returned on any number of ranks; ValueError names a misfit."""
        keys: set[str] = set()
        for flat in self.flats:
            for kind, share in flat.state.items():
                whole = share.new_zeros(share.numel() * self.world)
                for span in flat.spans:
                    start, stop, shape = flat.state_sizes(span)[kind]
                    key = f"{span.name}/{kind}"
                    keys.add(key)
                    if key not in tensors or tuple(tensors[key].shape) != tuple(shape):
                        actual = tuple(tensors[key].shape) if key in tensors else "nothing"
                        raise ValueError(f"optimizer state {key}: expected {shape}, found {actual}")
                    whole[start:stop].copy_(tensors[key].reshape(-1))
                at = self.rank * share.numel()
                share.copy_(whole[at : at + share.numel()])
        unknown = sorted(set(tensors) - keys)
        if unknown:
            raise ValueError(f"optimizer state {unknown[0]!r} belongs to no parameter of the model")
