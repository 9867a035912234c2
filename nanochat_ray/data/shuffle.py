"""A global shuffle of more rows than memory holds: scatter over shards, then permute each shard.

Every row draws its shard at random, and then its place in it, which together is a uniformly
random order (Rao 1961, Sandelius 1962). A part file keeps the rows of one task, a record batch
for each shard, so that a shard is gathered by reading its own rows only. What is drawn is a
function of (seed, part, row): the same on every run, wherever a task runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from nanochat_ray.data.order import mix, permute, stream
from nanochat_ray.data.shards import record_batch
from nanochat_ray.storage import Store


def draw(rows: int, shards: int, key: int) -> np.ndarray:
    """The shard of each row, int64 ``[rows]``."""
    drawn = mix(mix(np.arange(rows, dtype=np.uint64) + np.uint64(key % 2**64)))
    return (drawn % np.uint64(shards)).astype(np.int64)


def scatter(
    store: Store, name: str, ids: np.ndarray, mask: np.ndarray | None, shards: int, key: int
) -> None:
    """Writes rows ``ids [n, length]`` (and ``mask``) as a part file for ``gather``."""
    home = draw(len(ids), shards, key)
    batches = [
        record_batch(ids[home == shard], None if mask is None else mask[home == shard], "")
        for shard in range(shards)
    ]
    with store.writing(name) as out, pa.ipc.new_file(out, batches[0].schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def gather(
    store: Store, parts: Sequence[str], shard: int, key: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """All rows of one shard, from all ``parts``, in their final order."""

    def one(name: str) -> pa.RecordBatch:
        with store.open_input(name) as file:
            return pa.ipc.open_file(file).get_batch(shard)

    # Against object storage the time goes into waiting for many small reads.
    with ThreadPoolExecutor(1 if store.is_local else 16) as pool:
        batches = list(pool.map(one, parts))
    rows = sum(len(batch) for batch in batches)
    places = permute(np.arange(rows, dtype=np.int64), rows, stream(key, shard))

    def column(name: str) -> np.ndarray:
        arrays = [batch.column(name) for batch in batches]
        width = arrays[0].type.list_size
        return np.concatenate([a.flatten().to_numpy().reshape(-1, width) for a in arrays])[places]

    return column("ids"), column("mask") if "mask" in batches[0].schema.names else None
