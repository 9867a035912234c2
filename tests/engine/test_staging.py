from __future__ import annotations

import torch

from nanochat_ray.engine.cuda_graphs import graph_sizes
from nanochat_ray.engine.staging import ALIGNMENT, pack, unpack


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
