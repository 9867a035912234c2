"""How a group's flat buffers are shared between ranks, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim import flat as flat_module
from nanochat_ray.optim import sharded
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.flat import FlatGroup, Span
from nanochat_ray.optim.groups import Group
from nanochat_ray.optim.sharded import ShardedOptimizer
from tests.tiny import tiny_config


def flat_group(kind: str, shapes: list[tuple[int, ...]], rank: int, world: int) -> FlatGroup:
    parameters = {
        f"p{i}": nn.Parameter(torch.full(shape, float(i))) for i, shape in enumerate(shapes)
    }
    group = Group(
        kind=kind,  # type: ignore[arg-type]
        names=tuple(parameters),
        lr=0.1,
        weight_decay=0.0,
        beta1=0.9,
        beta2=0.9,
    )
    return FlatGroup(group, parameters, rank, world)


@pytest.mark.parametrize(("rank", "share"), [(0, (0, 12)), (1, (12, 24))])
def test_matrices_are_shared_whole(
    rank: int, share: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of 2 × 3 on two ranks: two for each, the last of which is padding."""
    monkeypatch.setattr(flat_module, "BUCKET", 6)
    flat = flat_group("muon", [(2, 3)] * 3, rank, 2)
    assert (flat.own_share.start, flat.own_share.stop) == share
    assert flat.weights.tolist() == [0.0] * 6 + [1.0] * 6 + [2.0] * 6 + [0.0] * 6
    assert flat.spans[1] == Span("p1", torch.Size((2, 3)), 6, 12)
    assert {name: len(state) for name, state in flat.state.items()} == {
        "momentum": 12,
        "second_moment": 2 * 3,  # wide matrices have one for each column
    }
    assert flat.state_sizes(flat.spans[1]) == {
        "momentum": (6, 12, (2, 3)),
        "second_moment": (3, 6, (1, 3)),
    }
    buckets = [(b.start, b.stop, b.owner, b.parameters) for b in flat.buckets()]
    assert buckets == [(0, 6, 0, 1), (6, 12, 0, 1), (12, 18, 1, 1)]


@pytest.mark.parametrize(
    ("size", "buckets"),
    [
        # A bucket takes matrices until it has at least so many elements, and ends with its owner.
        (1, [(0, 6, 0, 1), (6, 12, 0, 1), (12, 18, 0, 1), (18, 24, 1, 1), (24, 30, 1, 1)]),
        (7, [(0, 12, 0, 2), (12, 18, 0, 1), (18, 30, 1, 2)]),
        (12, [(0, 12, 0, 2), (12, 18, 0, 1), (18, 30, 1, 2)]),
        (13, [(0, 18, 0, 3), (18, 30, 1, 2)]),
    ],
)
def test_buckets_by_hand(
    size: int, buckets: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flat_module, "BUCKET", size)
    flat = flat_group("muon", [(3, 2)] * 5, 1, 2)
    assert [(b.start, b.stop, b.owner, b.parameters) for b in flat.buckets()] == buckets
    assert flat.state_sizes(flat.spans[4])["second_moment"] == (12, 15, (3, 1))


def test_a_rule_may_have_any_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a SOAP would: a square matrix for each of three matrices of 2 × 3, on two ranks."""
    monkeypatch.setattr(Group, "state_shapes", lambda self, shape: {"factor": (2, 2)})
    flats = [flat_group("muon", [(2, 3)] * 3, rank, 2) for rank in range(2)]
    assert [len(flat.state["factor"]) for flat in flats] == [8, 8]
    assert flats[1].state_sizes(flats[1].spans[2]) == {"factor": (8, 12, (2, 2))}
    weights, grads, factor = flats[1].buffers()
    assert [tuple(t.shape) for t in (weights, grads, factor)] == [(2, 2, 3), (2, 2, 3), (2, 2, 2)]
    weights.fill_(7)
    assert flats[1].weights.tolist() == [0.0] * 6 + [1.0] * 6 + [7.0] * 12


def test_other_parameters_are_split_anywhere() -> None:
    """Seven elements on three ranks: three for each, and two of padding."""
    flats = [flat_group("adamw", [(2, 2), (3,)], rank, 3) for rank in range(3)]
    shares = [(flat.own_share.start, flat.own_share.stop) for flat in flats]
    assert shares == [(0, 3), (3, 6), (6, 9)]
    (bucket,) = flats[1].buckets()
    assert (bucket.start, bucket.stop, bucket.owner, bucket.parameters) == (0, 9, -1, 2)
    assert {len(state) for state in flats[1].state.values()} == {3}
    assert flats[1].state_sizes(flats[1].spans[1]) == {
        "momentum": (4, 7, (3,)),
        "second_moment": (4, 7, (3,)),
    }


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_reductions_are_waited_for(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Two ranks with equal gradients, whose sum is there only after the wait. In the second step
    this rank has no sequence, so no backward pass starts a reduction."""

    class Reduction:
        def __init__(self, grads: torch.Tensor):
            self.grads, self.factor = grads, 2

        def wait(self) -> None:
            self.grads *= self.factor
            self.factor = 1

    def reduce(grads: torch.Tensor, **_: object) -> Reduction:
        return Reduction(grads)

    def reduce_scatter(share: torch.Tensor, grads: torch.Tensor, **_: object) -> Reduction:
        return Reduction(grads)

    for name, function in (
        ("is_initialized", lambda: True),
        ("get_rank", lambda: 0),
        ("get_world_size", lambda: 2),
        ("get_backend", lambda: backend),
        ("broadcast", lambda weights, src: None),
        ("all_reduce", reduce),
        ("reduce", reduce),
        ("reduce_scatter_single", reduce_scatter),
    ):
        monkeypatch.setattr(sharded.dist, name, function)
    model = GPT(tiny_config())
    optimizer = ShardedOptimizer(model, OptimConfig())
    for has_backward in (True, False):
        optimizer.zero_grad()
        if has_backward:
            optimizer.last_backward()
            model.loss(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).backward()
            assert all(bucket.in_flight for bucket in optimizer._buckets)
        for flat in optimizer.flats:
            flat.grads.fill_(1.0)
        optimizer._finish_reductions()
        for flat in optimizer.flats:
            for bucket in flat.buckets():
                assert (flat.grads[bucket.start : bucket.stop] == 2).all()
