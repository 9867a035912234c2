from __future__ import annotations

import itertools

import torch

from nanochat_ray.engine.cuda_graphs import graph_sizes, mixed_graph_sizes
from nanochat_ray.engine.staging import ALIGNMENT, HostArrays, pack, unpack


def test_packed_tensors_come_back() -> None:
    tensors = [
        torch.arange(5, dtype=torch.int32),
        torch.tensor([[1, 2], [3, -(2**40)]]),
        torch.empty((0, 3), dtype=torch.int64),
        torch.tensor([7], dtype=torch.int32),
    ]
    buffer = pack(tensors)
    assert buffer.nbytes == (2 + 2 + 0 + 1) * ALIGNMENT
    views = unpack(buffer, tensors)
    for tensor, view in zip(tensors, views, strict=True):
        assert view.dtype == tensor.dtype
        assert torch.equal(view, tensor)
    views[3].fill_(9)
    assert unpack(buffer, tensors)[3].item() == 9  # views, not copies


def test_graphs_are_eight_tokens_apart() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 4]
    assert graph_sizes(20) == [1, 2, 4, 8, 16, 24]
    assert graph_sizes(256)[-3:] == [240, 248, 256]
    assert graph_sizes(300)[-2:] == [256, 512]


def test_graphs_of_prompts_end_with_the_budget() -> None:
    assert mixed_graph_sizes(64) == [64]
    assert mixed_graph_sizes(200) == [64, 128, 192, 256]
    sizes = mixed_graph_sizes(20_000)
    assert sizes == mixed_graph_sizes(8192)
    assert sizes[-1] == 8192
    assert all(4 * large <= 5 * small for small, large in itertools.pairwise(sizes) if small >= 256)


def test_host_arrays_are_sent_with_one_copy() -> None:
    like = [torch.tensor([[1, 2], [3, 4]]), torch.tensor([5], dtype=torch.int32)]
    host, target = HostArrays(like, torch.device("cpu")), torch.empty_like(pack(like))
    numbers, last = host.arrays
    assert numbers.tolist() == [[1, 2], [3, 4]]
    numbers[1], last[:] = 9, 7
    host.wait()
    host.send(target)
    views = unpack(target, like)
    assert [view.tolist() for view in views] == [[[1, 2], [9, 9]], [7]]
