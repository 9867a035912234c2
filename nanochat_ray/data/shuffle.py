"""A global shuffle of more sequences than memory holds: scatter, then permute each shard.

Every sequence is assigned to a random shard and then to a random position in it, which together
is a uniformly random order (Rao 1961, Sandelius 1962). The assignment is a function of (seed, part,
sequence): the same in every run, wherever a task runs.

A shuffle part is the file of one task of the first pass, sorted by shard. It begins with int64
``[num_shards + 1]``: where the sequences of each shard begin, in bytes of the file. Gathering a
shard reads 16 bytes and that shard's sequences of each part, however many shards there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from nanochat_ray.data.order import derive_key, mix, permute
from nanochat_ray.storage import Store

_OFFSET_BYTES = 8


def assign_shards(num_sequences: int, num_shards: int, key: int) -> np.ndarray:
    """A random shard for each sequence, int64 ``[num_sequences]``."""
    bits = mix(mix(np.arange(num_sequences, dtype=np.uint64) + np.uint64(key % 2**64)))
    return (bits % np.uint64(num_shards)).astype(np.int64)


def sequence_dtype(ids: np.dtype, length: int, *, has_mask: bool) -> np.dtype:
    """A sequence in a shuffle part: ``ids [length]`` and, for fine-tuning, ``mask [length]``."""
    fields = [("ids", ids, (length,)), ("mask", np.dtype(np.uint8), (length,))]
    return np.dtype(fields[: 1 + has_mask])


def scatter(
    store: Store, name: str, ids: np.ndarray, mask: np.ndarray | None, num_shards: int, key: int
) -> None:
    """Writes sequences ``ids [n, length]`` (and ``mask``) as a shuffle part for ``gather``."""
    shards = assign_shards(len(ids), num_shards, key)
    order = np.argsort(shards, kind="stable")
    dtype = sequence_dtype(ids.dtype, ids.shape[1], has_mask=mask is not None)
    sequences = np.empty(len(ids), dtype)
    sequences["ids"] = ids[order]
    if mask is not None:
        sequences["mask"] = mask[order]
    firsts = np.searchsorted(shards[order], np.arange(num_shards + 1))
    offsets = _OFFSET_BYTES * (num_shards + 1) + dtype.itemsize * firsts.astype(np.int64)
    with store.writing(name) as file:
        file.write(offsets)
        file.write(sequences.view(np.uint8))


def gather(
    store: Store, shuffle_parts: Sequence[str], shard: int, key: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray | None]:
    """``ids [n, length]`` and ``mask`` of one shard, from all ``shuffle_parts``, in their final
    order. ``dtype`` is their ``sequence_dtype``. OSError for a part that ends too early."""

    def read(name: str) -> bytes:
        with store.open_input(name) as file:
            start, stop = np.frombuffer(
                file.read_at(2 * _OFFSET_BYTES, _OFFSET_BYTES * shard), np.int64
            ).tolist()
            data: bytes = file.read_at(stop - start, start)
        if len(data) != stop - start:
            raise OSError(f"shuffle part {name} of {store.uri} ends too early")
        return data

    # Against object storage most of the time is latency of many small reads.
    with ThreadPoolExecutor(1 if store.is_local else 16) as pool:
        sequences = np.frombuffer(b"".join(pool.map(read, shuffle_parts)), dtype)
    order = permute(np.arange(len(sequences)), len(sequences), derive_key(key, shard))
    mask = sequences["mask"][order] if "mask" in (dtype.names or ()) else None
    return sequences["ids"][order], mask
