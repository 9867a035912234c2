"""Shards on this machine's disk: local ones are used in place, remote ones are copied once.

Copies are private to the user, named by content and verified when a process first opens them; a
damaged copy is fetched again. Where the disk is too small for a dataset, the copies that were not
opened for longest make room: processes that still read them keep what they have mapped.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from nanochat_ray.data.manifest import Shard
from nanochat_ray.retry import retry
from nanochat_ray.storage import Store, cache_root

MIN_FREE_BYTES = 256 << 20
"""Of the cache's disk: copies do not take the last of it."""


def cache_folder() -> Path:
    """``$NANOCHAT_SHARD_CACHE``, by default ``shards`` in ``storage.cache_root``."""
    if folder := os.environ.get("NANOCHAT_SHARD_CACHE"):
        return Path(os.path.expanduser(folder)).absolute()
    return cache_root() / "shards"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage_error(where: str, digest: str, shard: Shard) -> ValueError:
    return ValueError(
        f"{where} is damaged: its SHA-256 is {digest[:16]}…, the manifest says "
        f"{shard.sha256[:16]}…; prepare the dataset again"
    )


def local_copy(store: Store, shard: Shard, *, is_verified: bool = False) -> Path:
    """A file on this disk with exactly the content that the manifest names.

    ``is_verified`` says that this process has had the file before: what is still there is not read
    again. Raises ValueError, naming the shard, if storage has no such content.
    """
    where = f"shard {shard.name} of {store.uri}"
    local = store.local_path(shard.name)
    if local is None:
        return _fetch(store, shard, where, is_verified)
    # Not ``exists``: to read from a FIFO or a device would never end.
    if not local.is_file():
        raise ValueError(f"{where} is missing or no regular file")
    try:
        digest = _digest(local)
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error}") from None
    if digest != shard.sha256:
        raise _damage_error(where, digest, shard)
    return local


def _fetch(store: Store, shard: Shard, where: str, is_verified: bool) -> Path:
    folder = cache_folder()
    # Named by content: datasets with equal shards share a copy, and none is ever stale.
    target = folder / f"{shard.sha256}.arrow"
    if _is_intact(target, shard, is_verified):
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # The ranks of a machine want a shard at the same moment: one of them reads it.
    with _lock(folder / f".lock-{shard.sha256[0]}"):
        if not _is_intact(target, shard):
            _write_copy(target, _read(store, shard, where))
    return target


def _is_intact(target: Path, shard: Shard, is_verified: bool = False) -> bool:
    with contextlib.suppress(OSError):
        if target.is_file() and target.stat().st_size == shard.size:
            is_intact = is_verified or _digest(target) == shard.sha256
            with contextlib.suppress(OSError):  # a cache may be read-only
                os.utime(target)
            return is_intact
    return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("wb") as file:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _read(store: Store, shard: Shard, where: str) -> bytes:
    try:
        data = retry(lambda: store.read_bytes(shard.name), where)
    except FileNotFoundError:
        raise ValueError(f"{where} is missing") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.sha256:
        raise _damage_error(where, digest, shard)
    return data


def _write_copy(target: Path, data: bytes) -> None:
    _make_room(target.parent, len(data))
    aside = target.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        aside.write_bytes(data)  # a copy that a loss of power damages is fetched again
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)


def _make_room(folder: Path, size: int) -> None:
    """Deletes copies until a copy of ``size`` bytes fits, those first that were not opened for
    longest."""

    def last_opened(copy: Path) -> float:
        with contextlib.suppress(FileNotFoundError):  # another process deletes, too
            return copy.stat().st_mtime
        return 0.0

    copies = iter(sorted(folder.glob("*.arrow"), key=last_opened))
    while shutil.disk_usage(folder).free < size + MIN_FREE_BYTES:
        if (copy := next(copies, None)) is None:
            return  # the write says what is wrong
        copy.unlink(missing_ok=True)
