"""What attention over paged memory needs to know of a step.

Legend: N tokens, S spans (each of one sequence), X tiles, P block pools, M blocks of the longest
sequence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from nanochat_ray.engine.staging import pack, unpack
from nanochat_ray.machine import send

TILE_ROWS = 64
"""Rows of a tile of a prompt: tokens, times query heads of one key/value head."""


def tile_tokens(group: int) -> int:
    """Tokens of a tile of a prompt, at most, with ``group`` query heads of a key/value head."""
    return max(1, TILE_ROWS // (1 << (group - 1).bit_length()))


class MetadataShape(NamedTuple):
    """Sizes of the tensors of a step."""

    num_tokens: int
    num_decodes: int
    """Tiles of one token, which come first."""
    num_tiles: int
    num_spans: int


@dataclass
class AttentionMetadata:
    """Which blocks a step reads and writes, in tensors that a CUDA graph can read."""

    num_decodes: int
    """Tiles of one token, which come first."""
    positions: Tensor
    """int64 ``[N]``"""
    tiles: Tensor
    """int32 ``[X, 4]``: neighbouring tokens of one span, which are computed together: the span, the
    first token, the number of tokens (0: an empty tile) and the position of the first one."""
    block_tables: Tensor
    """int32 ``[P, S, M]``: the pages that hold the keys of a span and of the tokens before it."""
    slot_mapping: Tensor
    """int64 ``[P, N]``: where the tokens' own keys are written, page by page."""

    @classmethod
    def zeros(cls, shape: MetadataShape, num_pools: int, max_blocks: int) -> AttentionMetadata:
        """On the CPU."""
        N = shape.num_tokens
        return cls(
            shape.num_decodes,
            torch.zeros(N, dtype=torch.int64),
            torch.zeros((shape.num_tiles, 4), dtype=torch.int32),
            torch.zeros((num_pools, shape.num_spans, max_blocks), dtype=torch.int32),
            torch.zeros((num_pools, N), dtype=torch.int64),
        )

    def tensors(self) -> list[Tensor]:
        return [self.positions, self.tiles, self.block_tables, self.slot_mapping]

    def to(self, device: torch.device) -> AttentionMetadata:
        """On a CUDA device: views of one buffer, which is sent without waiting."""
        tensors = self.tensors()
        if device.type != "cuda":
            return AttentionMetadata(self.num_decodes, *(t.to(device) for t in tensors))
        views = unpack(send(pack(tensors), device), tensors)
        return AttentionMetadata(self.num_decodes, *views)
