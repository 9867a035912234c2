"""Packed rows on storage: Arrow IPC files and the manifest that makes them a dataset.

A row is a fixed-size list of T + 1 token ids (uint16 or uint32); rows for fine-tuning carry a
mask of the same length (uint8). Files are read by memory map; remote ones are first copied to
this machine's cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from nanochat_ray.storage import Store

Split = Literal["train", "val"]
_TOKENIZER = b"tokenizer"


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True, kw_only=True)
class Shard:
    name: str
    rows: int
    size: int
    """Bytes of the file."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a dataset consists of and how it was made; a dataset without one does not exist."""

    kind: Literal["base", "sft"]
    tokenizer: str
    """Fingerprint."""
    sequence_len: int
    """T; rows hold T + 1 ids."""
    dtype: str
    splits: dict[str, list[Shard]]
    key: str
    """Hash of everything the rows depend on: equal keys, equal rows."""
    about: dict[str, Any] = field(default_factory=dict)
    """Parameters and statistics of the preparation."""

    def rows(self, split: str) -> int:
        return sum(shard.rows for shard in self.splits[split])

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the content: of all that the batches of a training run depend on.

        Unlike ``key`` it is made of the rows themselves and not of where they came from: input
        that was copied or touched gives the same digest, other bytes never do.
        """
        shards = {
            split: [(shard.rows, shard.sha256) for shard in self.splits[split]]
            for split in sorted(self.splits)
        }
        values = [self.kind, self.tokenizer, self.sequence_len, self.dtype, shards]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises ValueError if ``text`` is no manifest."""
        try:
            found = json.loads(text)
            found["splits"] = {
                name: [Shard(**shard) for shard in shards]
                for name, shards in found["splits"].items()
            }
            return cls(**found)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"manifest.json cannot be read: {error}") from None

    @classmethod
    def load(cls, store: Store) -> Manifest:
        return cls.from_json(store.read_text("manifest.json"))


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


def _cached(store: Store, shard: Shard) -> Path:
    """A file on this disk with the shard's content as storage has it."""
    local = store.local_path(shard.name)
    if local is not None:
        if not local.exists():
            raise ValueError(f"shard {shard.name} of {store.uri} is missing")
        return local
    folder = Path(os.environ.get("NANOCHAT_SHARD_CACHE") or Path(tempfile.gettempdir()))
    # Named by content: another dataset with the same bytes may share it, no stale one can.
    target = folder / "nanochat_ray-shards" / f"{shard.sha256}.arrow"
    if not (target.exists() and target.stat().st_size == shard.size):
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = target.with_suffix(f".{uuid.uuid4().hex}.tmp")
        try:
            data = store.read_bytes(shard.name)
        except FileNotFoundError:
            raise ValueError(f"shard {shard.name} of {store.uri} is missing") from None
        aside.write_bytes(data)
        os.replace(aside, target)
    return target


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
            path = _cached(self.store, shard)
            where = f"shard {shard.name} of {self.store.uri}"
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise ValueError(
                    f"{where} is damaged: its SHA-256 is {found[:16]}…, the manifest says "
                    f"{shard.sha256[:16]}…; prepare the dataset again"
                )
            self._open[number] = self._mapped(path, where, shard)
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
