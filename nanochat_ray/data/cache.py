"""Shards on this machine's disk: local ones are used in place, remote ones are copied once.

Copies are private to the user, named by content and verified whenever they are opened; a damaged
copy is fetched again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

from nanochat_ray.data.manifest import Shard
from nanochat_ray.retry import retry
from nanochat_ray.storage import Store, cache_root


def cache_folder() -> Path:
    """``$NANOCHAT_SHARD_CACHE``, by default ``shards`` in ``storage.cache_root``."""
    if folder := os.environ.get("NANOCHAT_SHARD_CACHE"):
        return Path(folder).expanduser().absolute()
    return cache_root() / "shards"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damage_error(where: str, digest: str, shard: Shard) -> ValueError:
    return ValueError(
        f"{where} is damaged: its SHA-256 is {digest[:16]}…, the manifest says "
        f"{shard.sha256[:16]}…; prepare the dataset again"
    )


def local_copy(store: Store, shard: Shard) -> Path:
    """A file on this disk with exactly the content that the manifest names.

    Raises ValueError, naming the shard, if storage has no such content.
    """
    where = f"shard {shard.name} of {store.uri}"
    local = store.local_path(shard.name)
    if local is None:
        return _fetch(store, shard, where)
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


def _fetch(store: Store, shard: Shard, where: str) -> Path:
    folder = cache_folder()
    # Named by content: datasets with equal shards share a copy, and none is ever stale.
    target = folder / f"{shard.sha256}.arrow"
    with contextlib.suppress(OSError):
        same_size = target.is_file() and target.stat().st_size == shard.size
        if same_size and _digest(target) == shard.sha256:
            return target
    try:
        data = retry(lambda: store.read_bytes(shard.name), where)
    except FileNotFoundError:
        raise ValueError(f"{where} is missing") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != shard.sha256:
        raise _damage_error(where, digest, shard)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    aside = target.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        aside.write_bytes(data)  # a copy that a loss of power damages is fetched again
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    return target
