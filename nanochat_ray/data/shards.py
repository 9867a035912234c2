"""Packed sequences in storage: Arrow IPC files; with its manifest a set of them is a dataset.

A record is one sequence, a fixed-size list of T + 1 token ids (uint16 or uint32); fine-tuning adds
a loss mask of the same length (uint8). Files are memory-mapped; remote ones are first copied to
this machine's cache.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from nanochat_ray.data.cache import local_copy
from nanochat_ray.data.manifest import Manifest, Shard, Split
from nanochat_ray.storage import HashingFile, Store

__all__ = [
    "Manifest",
    "SequenceReader",
    "Shard",
    "Split",
    "record_batch",
    "token_dtype",
    "write_shard",
]
_TOKENIZER = b"tokenizer"
MAX_OPEN_COPIES = 64
"""Copies of remote shards that a reader holds open: the cache can free the space of no more."""


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def record_batch(ids: np.ndarray, mask: np.ndarray | None, tokenizer: str) -> pa.RecordBatch:
    """Sequences as an Arrow batch; the schema carries the tokenizer's fingerprint."""
    columns = {"ids": ids} if mask is None else {"ids": ids, "mask": mask}
    arrays = [
        pa.FixedSizeListArray.from_arrays(
            pa.array(np.ascontiguousarray(value).reshape(-1)), value.shape[1]
        )
        for value in columns.values()
    ]
    batch = pa.record_batch(arrays, names=list(columns))
    return batch.replace_schema_metadata({_TOKENIZER: tokenizer})


def write_shard(
    store: Store, name: str, ids: np.ndarray, mask: np.ndarray | None, tokenizer: str = ""
) -> Shard:
    """Writes sequences ``ids [n, T + 1]`` (and ``mask``, uint8 of the same shape) as one file.

    ``tokenizer`` is the fingerprint of the tokenizer of the ids, or "".
    """
    batch = record_batch(ids, mask, tokenizer)
    with store.writing(name) as file:
        out = HashingFile(file)
        with pa.ipc.new_file(pa.PythonFile(out, "wb"), batch.schema) as writer:
            writer.write_batch(batch)
    return Shard(name=name, num_sequences=len(ids), size=out.size, sha256=out.sha256.hexdigest())


class SequenceReader:
    """Random access to the sequences of one split. A shard is verified when it is first opened."""

    def __init__(self, store: Store, manifest: Manifest, split: Split):
        self.store, self.manifest, self.split = store, manifest, split
        self.shards = manifest.splits[split]
        self._ends = np.cumsum([shard.num_sequences for shard in self.shards], dtype=np.int64)
        self._arrays: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}
        self._intact_shards: set[int] = set()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def check(self, max_bytes: int) -> None:
        """Opens, and so verifies, every shard if they hold at most ``max_bytes`` together.

        Raises ValueError that names the first one that is damaged, missing or of another kind.
        """
        if sum(shard.size for shard in self.shards) <= max_bytes:
            for index in range(len(self.shards)):
                self._open(index)

    def _open(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        """``ids`` and ``mask`` of one shard."""
        if index not in self._arrays:
            shard = self.shards[index]
            path = local_copy(self.store, shard, is_verified=index in self._intact_shards)
            self._intact_shards.add(index)
            while not self.store.is_local and len(self._arrays) >= MAX_OPEN_COPIES:
                del self._arrays[next(iter(self._arrays))]
            where = f"shard {shard.name} of {self.store.uri}"
            try:
                self._arrays[index] = self._map(path, where, shard)
            except (pa.ArrowException, AttributeError) as error:
                # Its checksum is right, so the manifest names a file that is no shard.
                reason = str(error).partition("\n")[0]
                raise ValueError(f"{where} is no shard of sequences: {reason:.200}") from None
        return self._arrays[index]

    def _map(self, path: Path, where: str, shard: Shard) -> tuple[np.ndarray, np.ndarray | None]:
        manifest = self.manifest
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        tokenizer = (batch.schema.metadata or {}).get(_TOKENIZER, b"").decode()
        if tokenizer and tokenizer != manifest.tokenizer:
            raise ValueError(
                f"{where} was written with tokenizer {tokenizer[:16]}; the manifest says "
                f"{manifest.tokenizer[:16]}"
            )
        ids = self._column(batch, "ids", np.dtype(manifest.dtype), where)
        mask = None
        if manifest.kind == "sft":
            mask = self._column(batch, "mask", np.dtype(np.uint8), where)
        if len(batch) != shard.num_sequences:
            raise ValueError(
                f"{where} has {len(batch)} sequences, the manifest says {shard.num_sequences}"
            )
        return ids, mask

    def _column(self, batch: pa.RecordBatch, name: str, dtype: np.dtype, where: str) -> np.ndarray:
        """A column as an array ``[n, T + 1]`` over the mapped file."""
        width = self.manifest.sequence_len + 1
        if name not in batch.schema.names:
            raise ValueError(f"{where} has no column {name!r}, only {batch.schema.names}")
        column = batch.column(name)
        size, kind = column.type.list_size, column.type.value_type
        if size != width or kind != pa.from_numpy_dtype(dtype):
            raise ValueError(
                f"{where} has sequences of {size} {kind}; the manifest says {width} {dtype}"
            )
        if column.null_count or len(column.values) != len(batch) * width:
            raise ValueError(f"{where} has a column {name!r} that is not sequences of {width}")
        return column.values.to_numpy().reshape(-1, width)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """``ids [n, T + 1]`` in the stored dtype, and for fine-tuning ``mask`` (uint8).

        ``indices`` is int64 ``[n]``, each from 0 to below ``len(self)``. Raises IndexError.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(
                f"sequence {indices.max()} of the {self.split} split, which has {len(self)}"
            )
        width = self.manifest.sequence_len + 1
        ids = np.empty((len(indices), width), dtype=self.manifest.dtype)
        has_mask = self.manifest.kind == "sft"
        mask = np.empty((len(indices), width), dtype=np.uint8) if has_mask else None
        shards = np.searchsorted(self._ends, indices, side="right")
        for shard in np.unique(shards):
            rows = shards == shard
            first = self._ends[shard] - self.shards[shard].num_sequences
            shard_ids, shard_mask = self._open(int(shard))
            local = indices[rows] - first
            ids[rows] = shard_ids[local]
            if mask is not None and shard_mask is not None:
                mask[rows] = shard_mask[local]
        return ids, mask
