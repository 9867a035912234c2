"""The optimizer: Muon and AdamW over flat buffers, each worker updating its share.

Parameters and gradients live in flat float32 buffers, one for each group; the tensors of the
model are views into them. A step is then, for each group,

    reduce the gradients → update the slice that this rank owns → gather the weights,

which is ZeRO stage 2 (Rajbhandari et al., arXiv 1910.02054) with no copies: the state exists once
over all ranks. A Muon group is a stack ``[K, m, n]`` split between matrices; an elementwise group,
such as AdamW's, is split anywhere. A reduction starts as soon as the backward
pass has produced all gradients of its bucket, and each gather overlaps with the next update.

State is saved and loaded by parameter name with full tensors, so it does not depend on the number
of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat_ray import machine
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.device_update import DeviceUpdate
from nanochat_ray.optim.flat import Bucket, FlatGroup
from nanochat_ray.optim.groups import Group, build_groups
from nanochat_ray.optim.muon import MuonRule

LARGE_TABLE = 1 << 20
"""Elements of a table from which on its reduction is one of its own."""


def _parts(group: Group, parameters: Mapping[str, nn.Parameter]) -> list[Group]:
    """An elementwise group with each large table by itself: the reduction of its gradient starts as
    soon as that is there, and not with the last gradient of the group."""
    if not group.is_elementwise:
        return [group]
    large = [name for name in group.names if parameters[name].numel() >= LARGE_TABLE]
    rest = tuple(name for name in group.names if name not in large)
    parts = [(name,) for name in large] + ([rest] if rest else [])
    return [replace(group, names=names) for names in parts]


class ShardedOptimizer:
    """Muon and AdamW for a model whose ranks hold equal weights.

    After construction the model's parameters are views into flat buffers and their gradients are
    allocated: call ``zero_grad`` of this class, never ``set_to_none``. With an initialised
    process group of more than one rank every method is collective. ``compute_dtype`` is that of
    Muon's orthogonalisation; weights and state are float32.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        compute_dtype: torch.dtype = torch.float32,
        *,
        compile_update: bool = False,
    ):
        """``compile_update`` compiles what Muon does on a GPU."""
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
        self.flats = [
            FlatGroup(part, parameters, self.rank, self.world, rule)
            for group in groups
            for part in _parts(group, parameters)
        ]
        device = self.flats[0].weights.device
        self.device_update = DeviceUpdate(compile_update) if device.type == "cuda" else None
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
        torch._foreach_zero_([flat.grads for flat in self.flats])

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

    @torch.no_grad()
    def step(
        self,
        step: int,
        *,
        lr_factor: float,
        momentum: float,
        scale: float | Tensor = 1.0,
        clip: float = 0.0,
        active: bool | Tensor = True,
    ) -> Tensor:
        """One step; returns the global gradient norm (0-d tensor) after scaling, before clipping.

        Gradients are summed over ranks and multiplied by ``scale``. If the norm is not finite, or
        ``active`` is false (on every rank alike), weights and state stay untouched on every rank.
        On a GPU nothing here waits for the device.
        """
        self._finish_reductions()
        update = self.device_update
        if update is not None:
            norm = self._sum_over_ranks(update.squares(self.flats)).sqrt() * scale
            update.start(step, norm, lr_factor, momentum, scale, clip, active)
        else:
            squares = torch.zeros(())
            scale = float(scale)
            for flat in self.flats:
                squares += flat.grads[flat.own_share].mul_(scale).square().sum()
            norm = self._sum_over_ranks(squares).sqrt()
            if not active or not torch.isfinite(norm):
                return norm
            if clip > 0 and norm > clip:
                for flat in self.flats:
                    flat.grads[flat.own_share].mul_(clip / norm)
        gathers: list[dist.Work | None] = []
        for flat in self.flats:
            if update is not None:
                update.apply(flat, self.compute_dtype)
            else:
                flat.update(step, lr_factor, momentum, self.compute_dtype)
            if self.world > 1:
                share = flat.weights[flat.own_share]
                source = share if self._scatters else share.clone()
                gathers += self._gather(flat.weights, source, flat.owners)
        for work in gathers:
            if work is not None:
                work.wait()
        return norm

    def _gather(self, whole: Tensor, share: Tensor, owners: int) -> list[dist.Work | None]:
        """Starts to fill ``whole`` with the shares of the first ``owners`` ranks, in order."""
        if owners == self.world:
            return [dist.all_gather_single(whole, share, async_op=True)]
        shares = whole.chunk(owners)
        if self.rank < owners:
            shares[self.rank].copy_(share)
        return [dist.broadcast(part, src=rank, async_op=True) for rank, part in enumerate(shares)]

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        if self.world > 1:
            dist.all_reduce(value)
        return value

    @torch.no_grad()
    def state_dict(self, on_rank: int | None = None) -> dict[str, Tensor]:
        """``{"<parameter>/<kind>": full tensor}`` in host memory; the same on every rank.

        With ``on_rank`` only that rank copies them to its host; others return nothing.
        """
        tensors: dict[str, Tensor] = {}
        for flat in self.flats:
            for kind, share in flat.state.items():
                whole = share
                if self.world > 1:
                    whole = share.new_empty(flat.state_shares[kind] * flat.owners)
                    for work in self._gather(whole, share, flat.owners):
                        if work is not None:
                            work.wait()
                if on_rank not in (None, self.rank):
                    continue
                for span in flat.spans:
                    start, stop, shape = flat.state_sizes(span)[kind]
                    view = whole[start:stop].view(shape)
                    tensors[f"{span.name}/{kind}"] = machine.copy_to_host(view)
        machine.finish_copies(self.flats[0].weights.device)
        return tensors

    def check_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """ValueError names what ``load_state_dict`` cannot load."""
        keys: set[str] = set()
        for flat in self.flats:
            for span in flat.spans:
                for kind, (_, _, shape) in flat.state_sizes(span).items():
                    key = f"{span.name}/{kind}"
                    keys.add(key)
                    if key not in tensors or tuple(tensors[key].shape) != tuple(shape):
                        actual = tuple(tensors[key].shape) if key in tensors else "nothing"
                        raise ValueError(f"optimizer state {key}: expected {shape}, found {actual}")
        unknown = sorted(set(tensors) - keys)
        if unknown:
            raise ValueError(f"optimizer state {unknown[0]!r} belongs to no parameter of the model")

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads what ``state_dict`` returned on any number of ranks. Rank 0 has the tensors, which
        ``check_state_dict`` has passed, and sends them to the others; theirs are not used."""
        for flat in self.flats:
            for kind, share in flat.state.items():
                whole = share.new_zeros(flat.state_shares[kind] * flat.owners)
                if self.rank == 0:
                    for span in flat.spans:
                        start, stop, _ = flat.state_sizes(span)[kind]
                        whole[start:stop].copy_(tensors[f"{span.name}/{kind}"].reshape(-1))
                if self.world > 1:
                    dist.broadcast(whole, src=0)
                at = self.rank * flat.state_shares[kind]
                share.copy_(whole[at : at + share.numel()])
