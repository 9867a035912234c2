"""A global shuffle of more sequences than memory holds: scatter, then permute each shard.

Every sequence is assigned to a random shard and then to a random position in it, which together
is a uniformly random order (Rao 1961, Sandelius 1962). A shuffle part is the file of one task, with
a record batch for each shard, so that gathering a shard reads that shard's sequences only. The
assignment is a function of (seed, part, sequence): the same in every run, wherever a task runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from nanochat_ray.data.order import derive_key, mix, permute
from nanochat_ray.data.shards import record_batch
from nanochat_ray.storage import Store


def assign_shards(num_sequences: int, num_shards: int, key: int) -> np.ndarray:
    """A random shard for each sequence, int64 ``[num_sequences]``."""
    bits = mix(mix(np.arange(num_sequences, dtype=np.uint64) + np.uint64(key % 2**64)))
    return (bits % np.uint64(num_shards)).astype(np.int64)


def scatter(
    store: Store, name: str, ids: np.ndarray, mask: np.ndarray | None, num_shards: int, key: int
) -> None:
    """Writes sequences ``ids [n, length]`` (and ``mask``) as a shuffle part for ``gather``."""
    shards = assign_shards(len(ids), num_shards, key)
    batches = [
        record_batch(ids[shards == shard], None if mask is None else mask[shards == shard], "")
        for shard in range(num_shards)
    ]
    with store.writing(name) as file, pa.ipc.new_file(file, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def gather(
    store: Store, shuffle_parts: Sequence[str], shard: int, key: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """All sequences of one shard, from all ``shuffle_parts``, in their final order."""

    def read(name: str) -> pa.RecordBatch:
        with store.open_input(name) as file:
            return pa.ipc.open_file(file).get_batch(shard)

    # Against object storage most of the time is latency of many small reads.
    with ThreadPoolExecutor(1 if store.is_local else 16) as pool:
        batches = list(pool.map(read, shuffle_parts))
    size = sum(len(batch) for batch in batches)
    order = permute(np.arange(size, dtype=np.int64), size, derive_key(key, shard))

    def column(name: str) -> np.ndarray:
        arrays = [batch.column(name) for batch in batches]
        width = arrays[0].type.list_size
        return np.concatenate([a.flatten().to_numpy().reshape(-1, width) for a in arrays])[order]

    return column("ids"), column("mask") if "mask" in batches[0].schema.names else None
