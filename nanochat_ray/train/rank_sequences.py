"""Which sequences of the deterministic data order a rank trains on. Needs no torch."""

from __future__ import annotations

import numpy as np

from nanochat_ray.data.order import global_batch_indices
from nanochat_ray.train.config import TrainConfig


def rank_sequences(
    config: TrainConfig, num_sequences: int, step: int, rank: int, world: int
) -> np.ndarray:
    """Indices (int64) of the sequences that ``rank`` of ``world`` trains on in ``step``.

    They are a contiguous part of the global batch. Where the sizes divide, the micro-batches of
    all ranks are those that one rank would make.
    """
    sequences = global_batch_indices(num_sequences, config.seed, config.global_batch_size, step)
    return np.array_split(sequences, world)[rank]
