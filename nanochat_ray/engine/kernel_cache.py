"""Compiled kernels on disk, shared by all engines of one user: across starts and across replicas.

A library runs with the rights of the process, so only files that no other user can have written
are loaded: the folder is the user's own (mode 0700), no other user may replace one of its parents,
and each file is the user's own. A file's name ends in the SHA-256 of its content, so that a damaged
file is detected before the dynamic loader maps it. Files are renamed into place, atomically,
however many processes compile at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from pathlib import Path

from nanochat_ray.storage import cache_root

MAX_FILES = 128
"""The newest libraries, of about 100 KB each, are kept; old ones are of other versions."""
MAX_BYTES = 64 << 20
"""A larger file is not a kernel library."""


def default_folder() -> Path:
    return cache_root() / "kernels"


def private_folder(path: Path) -> Path:
    """``path`` without symbolic links, created with mode 0700 if it is missing.

    OSError if it cannot be created, is not the user's, or could be replaced by another user.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = path.resolve()
    status, user = path.stat(), os.geteuid()
    if status.st_uid != user:
        raise PermissionError(f"{path} belongs to another user ({status.st_uid})")
    if status.st_mode & 0o077:
        path.chmod(0o700)
    for parent in path.parents:
        status = parent.stat()
        if status.st_uid not in (0, user):
            raise PermissionError(f"{parent} belongs to another user ({status.st_uid})")
        writable_by_others = status.st_mode & stat.S_IWOTH
        if status.st_gid != os.getegid():
            writable_by_others |= status.st_mode & stat.S_IWGRP
        # In a folder with the sticky bit, such as /tmp, only owners can rename.
        if writable_by_others and not status.st_mode & stat.S_ISVTX:
            raise PermissionError(f"{parent} may be written by other users")
    return path


def find(folder: Path, key: str) -> Path | None:
    """An intact library for ``key`` in a private folder. Damaged files are removed."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        if _is_intact(path):
            return path
        with contextlib.suppress(OSError):
            path.unlink()
    return None


def publish(folder: Path, key: str, library: bytes) -> Path:
    """Writes a library for ``key`` to a private folder, atomically. OSError if it cannot."""
    path = folder / f"{key}-{hashlib.sha256(library).hexdigest()}.so"
    handle, temporary = tempfile.mkstemp(dir=folder, suffix=".tmp")  # mode 0600
    try:
        with open(handle, "wb") as file:
            file.write(library)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _prune(folder)
    return path


def _is_intact(path: Path) -> bool:
    """Whether a file is the user's own and its content matches its name."""
    try:
        # Does not follow a link or block on a FIFO.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
                return False
            if status.st_uid != os.geteuid() or status.st_mode & 0o022:
                return False
            digest = hashlib.sha256(file.read()).hexdigest()
    except OSError:
        return False
    return path.stem.endswith(f"-{digest}")


def _prune(folder: Path) -> None:
    """Keeps the newest ``MAX_FILES``. Another process may do the same at the same time."""
    ages: list[tuple[float, Path]] = []
    for path in folder.iterdir():
        try:
            ages.append((path.lstat().st_mtime, path))
        except FileNotFoundError:
            continue
    for _, path in sorted(ages)[:-MAX_FILES]:
        with contextlib.suppress(OSError):
            path.unlink()
