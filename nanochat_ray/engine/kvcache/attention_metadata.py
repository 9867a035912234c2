"""What attention over paged memory needs to know of a step.

Legend: N tokens, S spans (each of one sequence), P block pools, M blocks of the longest sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat_ray.engine.staging import pack, unpack
from nanochat_ray.machine import send


@dataclass
class AttentionMetadata:
    """Which blocks a step reads and writes, in tensors that a CUDA graph can read."""

    max_seqlen_q: int
    """Most tokens of a span."""
    positions: Tensor
    """int64 ``[N]``"""
    cu_seqlens_q: Tensor
    """int32 ``[S + 1]``: span i has tokens ``cu_seqlens_q[i]`` to ``cu_seqlens_q[i + 1]``."""
    seqused_k: Tensor
    """int32 ``[S]``: keys that the last token of a span attends to without a window."""
    block_tables: Tensor
    """int32 ``[P, S, M]``: the pages that hold those keys."""
    slot_mapping: Tensor
    """int64 ``[P, N]``: where the tokens' own keys are written, page by page."""
    buffer: Tensor | None = field(default=None, init=False)
    """What the tensors are views of, on a GPU."""

    def _tensors(self) -> list[Tensor]:
        lengths = [self.cu_seqlens_q, self.seqused_k]
        return [self.positions, *lengths, self.block_tables, self.slot_mapping]

    def to(self, device: torch.device) -> AttentionMetadata:
        """On a CUDA device: views of one buffer, which is sent without waiting."""
        if device.type != "cuda":
            return AttentionMetadata(self.max_seqlen_q, *(t.to(device) for t in self._tensors()))
        tensors = self._tensors()
        buffer = send(pack(tensors), device)
        metadata = AttentionMetadata(self.max_seqlen_q, *unpack(buffer, tensors))
        metadata.buffer = buffer
        return metadata

    def copy_(self, other: AttentionMetadata) -> None:
        """Takes over the values of ``other``, which has the same shapes."""
        if self.buffer is not None:
            self.buffer.copy_(send(pack(other._tensors()), self.buffer.device))
            return
        for target, source in zip(self._tensors(), other._tensors(), strict=True):
            target.copy_(source)
