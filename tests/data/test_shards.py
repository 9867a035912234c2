"""Shards: written, read by index, verified, cached."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from nanochat_ray.data import cache, shards
from nanochat_ray.data.cache import cache_folder
from nanochat_ray.data.shards import Manifest, SequenceReader, token_dtype, write_shard
from nanochat_ray.storage import Store
from tests.tiny import write_dataset


def reader(root: Store, kind: str = "base") -> SequenceReader:
    store = root.child("datasets", kind)
    return SequenceReader(store, Manifest.load(store), "train")


def test_sequences_are_read_by_index(root: Store) -> None:
    write_dataset(root, "sft", "sft", rows=21)
    rows = reader(root, "sft")
    ids, mask = rows.read(np.arange(21))
    assert mask is not None
    some = np.asarray([20, 3, 3, 11])
    again, loss_mask = rows.read(some)
    assert np.array_equal(again, ids[some])
    assert np.array_equal(loss_mask, mask[some])


def write_numbered(root: Store, sizes: tuple[int, ...]) -> SequenceReader:
    """A dataset whose sequence n is n, n + 100, n + 200, in shards of these sizes."""
    store, shards, first = root.child("datasets", "numbered"), [], 0
    for number, size in enumerate(sizes):
        ids = np.arange(first, first + size, dtype=np.uint16)[:, None] + [0, 100, 200]
        shards.append(write_shard(store, f"{number}.arrow", ids.astype(np.uint16), None))
        first += size
    manifest = Manifest(
        kind="base",
        tokenizer="",
        sequence_len=2,
        dtype="uint16",
        splits={"train": shards, "val": []},
        key="test",
        about={},
    )
    return SequenceReader(store, manifest, "train")


def test_sequences_are_numbered_over_shards(root: Store) -> None:
    rows = write_numbered(root, (2, 1, 3))
    assert len(rows) == 6
    indices = np.asarray([5, 0, 2, 3, 2, 1])
    ids, mask = rows.read(indices)
    assert mask is None
    assert ids.dtype == np.uint16
    assert ids.tolist() == [[n, n + 100, n + 200] for n in indices]
    assert rows.read(np.empty(0, dtype=np.int64))[0].shape == (0, 3)
    for index in (-1, 6):
        with pytest.raises(IndexError, match="train split, which has 6"):
            rows.read(np.asarray([0, index]))
    assert len(SequenceReader(rows.store, rows.manifest, "val")) == 0


def test_small_datasets_are_checked_whole(root: Store) -> None:
    rows = write_numbered(root, (2, 1, 3))
    size = sum(shard.size for shard in rows.shards)
    Path(root.root, "datasets", "numbered", "2.arrow").write_bytes(b"damaged")
    rows.check(size - 1)  # too much to read before a run
    with pytest.raises(ValueError, match=r"shard 2\.arrow of"):
        rows.check(size)


def replace_shard(root: Store, rows: SequenceReader, array: pa.Array) -> SequenceReader:
    """The dataset of ``rows`` with another first shard, whose checksum is right."""
    file = Path(root.root, "datasets", "numbered", "0.arrow")
    batch = pa.record_batch([array], names=["ids"])
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, batch.schema) as writer:
        writer.write_batch(batch)
    data = file.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    shard = replace(rows.shards[0], size=len(data), sha256=digest)
    manifest = replace(rows.manifest, splits={"train": [shard, *rows.shards[1:]], "val": []})
    return SequenceReader(rows.store, manifest, "train")


@pytest.mark.parametrize(
    ("array", "error"),
    [
        (pa.array([[1, 2, 3]], pa.list_(pa.uint16(), 3)), "has 1 sequences, the manifest says 2"),
        (
            pa.array([[1, 2, 3], None], pa.list_(pa.uint16(), 3)),
            "has a column 'ids' that is not sequences of 3",
        ),
        (pa.array([1, 2], pa.uint16()), "is no shard of sequences: ."),
        (pa.array([[1, 2, 3]] * 2, pa.list_(pa.uint32(), 3)), "has sequences of 3 uint32"),
        (pa.array([[1, 2]] * 2, pa.list_(pa.uint16(), 2)), "has sequences of 2 uint16"),
    ],
)
def test_a_file_that_is_no_shard_is_named(root: Store, array: pa.Array, error: str) -> None:
    rows = replace_shard(root, write_numbered(root, (2, 1)), array)
    with pytest.raises(ValueError, match=rf"shard 0\.arrow of .* {error}"):
        rows.read(np.asarray([0]))


def test_tokens_are_stored_in_the_narrowest_type() -> None:
    kinds = {size: token_dtype(size) for size in (265, 1 << 16, (1 << 16) + 1)}
    assert kinds == {265: np.uint16, 1 << 16: np.uint16, (1 << 16) + 1: np.uint32}


def test_a_flipped_byte_is_refused_by_name(root: Store) -> None:
    write_dataset(root, "base")
    path = Path(root.root) / "datasets" / "base" / "train-1.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    rows = reader(root)
    rows.read(np.asarray([0]))
    with pytest.raises(ValueError, match=r"shard train-1\.arrow of .* is damaged"):
        rows.read(np.asarray([40]))
    path.unlink()
    with pytest.raises(ValueError, match=r"shard train-1\.arrow of .* is missing"):
        reader(root).read(np.asarray([40]))


def test_a_shard_of_another_width_is_refused(root: Store) -> None:
    write_dataset(root, "base")
    store = root.child("datasets", "base")
    wider = replace(Manifest.load(store), sequence_len=48)
    store.write_text("manifest.json", wider.to_json())
    with pytest.raises(ValueError, match=r"has sequences of 33 uint16; the manifest says 49"):
        reader(root).read(np.asarray([0]))


def test_a_shard_of_another_kind_or_tokenizer_is_refused(root: Store) -> None:
    manifest = write_dataset(root, "base")
    store = root.child("datasets", "base")
    with pytest.raises(ValueError, match=r"shard train-0\.arrow .* has no column 'mask'"):
        SequenceReader(store, replace(manifest, kind="sft"), "train").read(np.asarray([0]))
    shard = write_shard(store, "other.arrow", np.zeros((3, 33), np.uint16), None, "f" * 64)
    strange = replace(manifest, splits={"train": [shard]})
    with pytest.raises(ValueError, match=r"other\.arrow .* was written with tokenizer ffff"):
        SequenceReader(store, strange, "train").read(np.asarray([0]))
    with pytest.raises(IndexError, match="sequence 50 of the train split, which has 50"):
        SequenceReader(store, manifest, "train").read(np.asarray([50]))


def test_shards_on_s3_are_read_and_checked_too(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOCHAT_SHARD_CACHE", str(tmp_path))
    root = Store.at(s3).child("rows")
    write_dataset(root, "base")
    local = Store.at(str(tmp_path / "local"))
    write_dataset(local, "base")
    numbers = np.asarray([3, 49, 0])
    sequences = reader(local).read(numbers)[0]
    assert np.array_equal(reader(root).read(numbers)[0], sequences)
    copies = sorted(tmp_path.glob("*.arrow"))
    assert len(copies) == 2
    for copy in copies:  # one of the right size that is damaged, one that is cut
        data = copy.read_bytes()
        copy.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if copy == copies[0] else data[:9])
    assert np.array_equal(reader(root).read(numbers)[0], sequences)
    assert sorted(tmp_path.glob("[!.]*")) == [*copies, tmp_path / "local"]
    store = root.child("datasets", "base")
    data = store.read_bytes("train-0.arrow")[:-1] + b"?"
    copies[0].unlink()
    copies[1].unlink()
    store.write_bytes("train-0.arrow", data)
    with pytest.raises(ValueError, match=r"shard train-0\.arrow of s3.* is damaged"):
        reader(root).read(np.asarray([3]))


def record_remote_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes all stores count as remote; the names of files that are read from them."""
    monkeypatch.setenv("NANOCHAT_SHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Store, "local_path", lambda self, name: None)
    monkeypatch.setattr(Store, "is_local", property(lambda self: False))
    reads: list[str] = []
    read_bytes = Store.read_bytes

    def read(self: Store, name: str) -> bytes:
        reads.append(name)
        return read_bytes(self, name)

    monkeypatch.setattr(Store, "read_bytes", read)
    return reads


def test_ranks_that_want_a_shard_at_once_read_it_once(
    root: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = write_numbered(root, (4, 4))
    reads = record_remote_reads(tmp_path, monkeypatch)
    readers = [SequenceReader(rows.store, rows.manifest, "train") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        ids = list(pool.map(lambda reader: reader.read(np.arange(8))[0][:, 0].tolist(), readers))
    assert ids == [list(range(8))] * 4
    assert sorted(reads) == ["0.arrow", "1.arrow"]


def test_old_copies_make_room(root: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that holds two shards, and a reader with one open at a time."""
    monkeypatch.setattr(shards, "MAX_OPEN_COPIES", 1)
    rows = write_numbered(root, (4, 4, 4))
    reads = record_remote_reads(tmp_path, monkeypatch)
    size = rows.shards[0].size

    def free(folder: Path) -> SimpleNamespace:
        size_of_copies = sum(copy.stat().st_size for copy in folder.glob("*.arrow"))
        return SimpleNamespace(free=2 * size - size_of_copies + cache.MIN_FREE_BYTES)

    monkeypatch.setattr(cache.shutil, "disk_usage", free)
    utime, tomorrow = os.utime, itertools.count(int(time.time()) + 86_400)
    monkeypatch.setattr(cache.os, "utime", lambda path: utime(path, (0, next(tomorrow))))

    def read(*order: int) -> list[str]:
        reads.clear()
        for shard in order:
            (ids,) = rows.read(np.asarray([4 * shard]))[0]
            assert ids[0] == 4 * shard
            assert list(rows._arrays) == [shard]
        return reads

    assert read(0, 1, 0) == ["0.arrow", "1.arrow"]
    monkeypatch.setattr(cache, "_digest", None)  # what this reader has verified is not read again
    assert read(1, 0) == []
    assert read(2) == ["2.arrow"]  # in the place of 1
    assert read(0, 1) == ["1.arrow"]
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 2


def test_a_cache_on_a_file_system_without_locks(
    root: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    rows = write_numbered(root, (4, 4))
    record_remote_reads(tmp_path, monkeypatch)
    monkeypatch.setattr(cache.fcntl, "flock", refuse)
    sequences = SequenceReader(rows.store, rows.manifest, "train").read(np.arange(8))[0]
    assert sequences[:, 0].tolist() == list(range(8))


def test_the_shard_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_SHARD_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "nanochat_ray" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "nanochat_ray" / "shards"
