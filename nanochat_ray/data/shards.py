"""Packed rows on storage: Arrow IPC files and the manifest that makes them a dataset.

A row is a fixed-size list of T + 1 token ids (uint16 or uint32); rows for fine-tuning carry a
mask of the same length (uint8). Files are read by memory map; remote ones are first copied to
this machine's cache.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nanochat_ray.data.cache import local_copy
from nanochat_ray.data.manifest import Manifest, Shard, Split
from nanochat_ray.storage import Store

__all__ = ["Manifest", "RowReader", "Shard", "Split", "record_batch", "token_dtype", "write_shard"]
_TOKENIZER = b"tokenizer"


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class _Hashing:
    """A stream that hashes and counts what passes through it."""

    def __init__(self, stream: Any):
        self.stream, self.sha256, self.size = stream, hashlib.sha256(), 0

    closed = False

    def write(self, data: Any) -> int:
        self.stream.write(data)
        self.sha256.update(data)
        self.size += len(memoryview(data).cast("B"))
        return len(data)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


def record_batch(ids: np.ndarray, mask: np.ndarray | None, tokenizer: str) -> pa.RecordBatch:
    """Rows as Arrow has them; the schema carries the tokenizer's fingerprint."""
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
    """Writes rows ``ids [n, T + 1]`` (and ``mask``, uint8 of the same shape) as one file.

    ``tokenizer`` is the fingerprint of the one that made the ids, if it is known.
    """
    batch = record_batch(ids, mask, tokenizer)
    with store.writing(name) as stream:
        out = _Hashing(stream)
        with pa.ipc.new_file(pa.PythonFile(out, "wb"), batch.schema) as writer:
            writer.write_batch(batch)
    return Shard(name=name, rows=len(ids), size=out.size, sha256=out.sha256.hexdigest())


class RowReader:
    """Random access to the rows of one split. Each shard is checked when it is first opened."""

    def __init__(self, store: Store, manifest: Manifest, split: Split):
        self.store, self.manifest, self.split = store, manifest, split
        self.shards = manifest.splits[split]
        self._ends = np.cumsum([shard.rows for shard in self.shards], dtype=np.int64)
        self._open: dict[int, tuple[np.ndarray, np.ndarray | None]] = {}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def check(self, limit: int) -> None:
        """Opens, and so checks, every shard if they hold at most ``limit`` bytes together.

        Raises ValueError that names the first one that is damaged, missing or of another kind.
        """
        if sum(shard.size for shard in self.shards) <= limit:
            for number in range(len(self.shards)):
                self._arrays(number)

    def _arrays(self, number: int) -> tuple[np.ndarray, np.ndarray | None]:
        if number not in self._open:
            shard = self.shards[number]
            path = local_copy(self.store, shard)
            where = f"shard {shard.name} of {self.store.uri}"
            try:
                self._open[number] = self._mapped(path, where, shard)
            except (pa.ArrowException, AttributeError) as error:
                # Its checksum is right, so the manifest names a file that is no shard.
                reason = str(error).partition("\n")[0]
                raise ValueError(f"{where} is no shard of rows: {reason:.200}") from None
        return self._open[number]

    def _mapped(self, path: Path, where: str, shard: Shard) -> tuple[np.ndarray, np.ndarray | None]:
        manifest = self.manifest
        batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        made_by = (batch.schema.metadata or {}).get(_TOKENIZER, b"").decode()
        if made_by and made_by != manifest.tokenizer:
            raise ValueError(
                f"{where} was made with tokenizer {made_by[:16]}; the manifest says "
                f"{manifest.tokenizer[:16]}"
            )
        width, columns = manifest.sequence_len + 1, {"ids": np.dtype(manifest.dtype)}
        if manifest.kind == "sft":
            columns["mask"] = np.dtype(np.uint8)
        found = []
        for name, dtype in columns.items():
            if name not in batch.schema.names:
                raise ValueError(f"{where} has no column {name!r}, only {batch.schema.names}")
            column = batch.column(name)
            size, kind = column.type.list_size, column.type.value_type
            if size != width or kind != pa.from_numpy_dtype(dtype):
                raise ValueError(
                    f"{where} has rows of {size} {kind}; the manifest says {width} {dtype}"
                )
            if column.null_count or len(column.values) != len(batch) * width:
                raise ValueError(f"{where} has a column {name!r} that is not rows of {width}")
            found.append(column.values.to_numpy().reshape(-1, width))
        if len(batch) != shard.rows:
            raise ValueError(f"{where} has {len(batch)} rows, the manifest says {shard.rows}")
        return found[0], found[1] if len(found) > 1 else None

    def rows(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """``ids [n, T + 1]`` in the stored dtype, and for fine-tuning ``mask`` (uint8).

        ``numbers`` is int64 ``[n]``, each from 0 to below ``len(self)``.
        """
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(
                f"row {numbers.max()} of the {self.split} split, which has {len(self)}"
            )
        width = self.manifest.sequence_len + 1
        ids = np.empty((len(numbers), width), dtype=self.manifest.dtype)
        masked = self.manifest.kind == "sft"
        mask = np.empty((len(numbers), width), dtype=np.uint8) if masked else None
        home = np.searchsorted(self._ends, numbers, side="right")
        for number in np.unique(home):
            chosen = home == number
            first = self._ends[number] - self.shards[number].rows
            found, learned = self._arrays(int(number))
            local = numbers[chosen] - first
            ids[chosen] = found[local]
            if mask is not None and learned is not None:
                mask[chosen] = learned[local]
        return ids, mask
