"""Several tensors in one buffer, so that a step sends them to a GPU with one copy.

A copy costs the host about 10 µs whatever its size, which for a small model is what a kernel takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 16
"""Bytes; Triton compiles faster loads for pointers that are multiples of this."""


def pack(tensors: Sequence[Tensor]) -> Tensor:
    """uint8, on the CPU: the contiguous CPU ``tensors``, each from a multiple of ALIGNMENT on."""
    offsets, size = _layout(tensors)
    buffer = torch.empty(size, dtype=torch.uint8)
    for tensor, view in zip(tensors, _views(buffer, offsets, tensors), strict=True):
        view.copy_(tensor)
    return buffer


def unpack(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``buffer``, on any device, with the shapes and dtypes of what was packed."""
    offsets, size = _layout(like)
    assert buffer.numel() == size
    return _views(buffer, offsets, like)


class HostArrays:
    """Arrays in one page-locked buffer, which one copy sends to a GPU without waiting."""

    def __init__(self, like: Sequence[Tensor], device: torch.device):
        """With the shapes and dtypes of the tensors, and their values."""
        values = pack(like)
        is_cuda = device.type == "cuda"
        self._buffer = values.pin_memory() if is_cuda else values
        self._event = torch.cuda.Event() if is_cuda else None
        self.arrays = [tensor.numpy() for tensor in unpack(self._buffer, like)]

    def wait(self) -> None:
        """Until the last copy has read the arrays, so that they may change."""
        if self._event is not None:
            self._event.synchronize()

    def send(self, target: Tensor) -> None:
        """Copies all to ``target``, uint8, a buffer of the same size."""
        target.copy_(self._buffer, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(target.device))


def _layout(tensors: Sequence[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins, and the size of all, in bytes."""
    offsets, end = [], 0
    for tensor in tensors:
        offsets.append(end)
        end += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


def _views(buffer: Tensor, offsets: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    return [
        buffer[offset : offset + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for offset, tensor in zip(offsets, like, strict=True)
    ]
