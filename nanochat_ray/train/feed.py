"""Batches straight from the shards, for training without Ray: the order of contract, no more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nanochat_ray.config import TrainConfig
from nanochat_ray.data.order import batch_rows
from nanochat_ray.data.shards import RowReader
from nanochat_ray.train.step import Batch


def rank_rows(config: TrainConfig, num_rows: int, step: int, rank: int, world: int) -> np.ndarray:
    """Row numbers (int64) that ``rank`` of ``world`` trains on in ``step``: a run of the batch.

    Where the sizes divide, the micro-batches of all ranks are those that one rank would make.
    """
    rows = batch_rows(num_rows, config.seed, config.batch_rows, step)
    return np.array_split(rows, world)[rank]


def from_shards(
    reader: RowReader, config: TrainConfig, rank: int, world: int
) -> Callable[[int], Iterator[Batch]]:
    """This rank's batches from any step on, one read ahead in a thread."""

    def read(step: int) -> Batch:
        ids, mask = reader.rows(rank_rows(config, len(reader), step, rank, world))
        return Batch(ids, mask)

    def batches(start: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as pool:
            coming = pool.submit(read, start)
            for step in range(start, config.steps):
                batch = coming.result()
                if step + 1 < config.steps:
                    coming = pool.submit(read, step + 1)
                yield batch

    return batches
