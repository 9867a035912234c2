"""One place for everything that is kept: a folder, S3 or GCS behind the same few calls.

A ``Store`` is a root and its file system. A file appears whole or not at all: on a local disk it
is written aside and renamed, in an object store one upload is one atomic object. A folder of many
files is made whole by its manifest, which is written last (``checkpoint`` and ``data`` do that).
"""

from __future__ import annotations

import contextlib
import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from nanochat_ray.checks import check_name, require, shown

SCHEMES = ("file", "s3", "gs")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # one letter would be a drive of Windows


def default_root() -> str:
    """``$XDG_CACHE_HOME/nanochat_ray``, by default ``~/.cache/nanochat_ray``."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(cache) / "nanochat_ray")


def absolute(uri: str) -> str:
    """``uri`` so that it means the same in every process, whatever its working directory and home.

    A local path, with or without ``file://``, becomes an absolute one with ``~`` expanded; other
    URIs stay as they are. Raises ValueError, naming the URI, for a scheme that is not supported.
    """
    allowed = ", ".join(f"{s}://" for s in SCHEMES)
    require(isinstance(uri, str), "storage", uri, f"a folder or one of {allowed}")
    match = _SCHEME.match(uri)
    scheme = match[1].lower() if match else ""
    ok = bool(uri) and "\0" not in uri and (not scheme or scheme in SCHEMES)
    require(ok, "storage", uri, f"give a folder or one of {allowed}")
    if scheme not in ("", "file"):
        return uri
    path = Path(re.sub("^file:(//)?", "", uri, flags=re.IGNORECASE))
    try:
        return str(path.expanduser().absolute())
    except RuntimeError as error:  # ~nobody
        raise ValueError(f"storage={shown(uri)} is not allowed: {error}") from None


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path in it that ``uri`` names.

    A path without a scheme is a local one. S3 takes pyarrow's query fields
    (``s3://bucket/path?endpoint_override=host:port&scheme=http``); its credentials come from the
    environment, never from the URI. Raises ValueError, naming the URI, for any other scheme.
    """
    uri = absolute(uri)
    if uri.startswith("/") or _SCHEME.match(uri) is None:
        return pafs.LocalFileSystem(), uri
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        raise ValueError(f"storage={shown(uri)} is not allowed: {error}") from None
    if "@" in parts.netloc:
        raise ValueError(
            f"storage={parts.scheme}://… holds credentials: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment instead"
        )
    require(bool(parts.netloc), "storage", uri, f"{parts.scheme}://bucket or a folder of it")
    try:
        # An endpoint that is dead or silent ends a call after about 10 s, by pyarrow's defaults.
        return pafs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise ValueError(f"storage={shown(uri)} cannot be opened: {error}") from None


@dataclass(frozen=True)
class Store:
    """A folder of a file system. Paths given to its methods are relative to it."""

    uri: str
    fs: pafs.FileSystem
    root: str

    @classmethod
    def at(cls, uri: str) -> Store:
        fs, root = filesystem(uri)
        return cls(absolute(uri), fs, root.rstrip("/"))

    def __reduce__(self) -> tuple[Any, ...]:
        # A store travels to other processes as its URI: credentials stay in their environment.
        return Store.at, (self.uri,)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def child(self, *parts: str) -> Store:
        """The folder below this one that ``parts`` name, each one entry. Raises ValueError."""
        for part in parts:
            check_name("name", part)
        base, mark, query = (self.uri, "", "") if self.is_local else self.uri.partition("?")
        uri = "/".join([base.rstrip("/"), *parts]) + mark + query
        return Store(uri, self.fs, "/".join([self.root, *parts]))

    def path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str = "") -> bool:
        return self.fs.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        info = self.fs.get_file_info(self.path(name))
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{self.uri}: there is no file {name}")
        return int(info.size)

    def read_bytes(self, name: str) -> bytes:
        with self.open_input(name) as stream:
            return stream.read()

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    def open_input(self, name: str) -> Any:
        """A seekable pyarrow file. Raises FileNotFoundError."""
        self.size(name)
        return self.fs.open_input_file(self.path(name))

    def local_path(self, name: str) -> Path | None:
        """Where the file lies on this machine's disk, so that it can be memory-mapped, or None."""
        return Path(self.path(name)) if self.is_local else None

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A stream to a file that appears under its name only when the block ends without error."""
        target = self.path(name)
        if not self.is_local:
            # pyarrow cannot abandon an upload: after an error a short object may remain, which no
            # manifest names. ``write_bytes`` sends its data in one piece and has no such gap.
            # Without compression=None it would gzip whatever is called .gz.
            with self.fs.open_output_stream(target, compression=None) as stream:
                yield stream
            return
        self.fs.create_dir(os.path.dirname(target), recursive=True)
        aside = f"{target}.{uuid.uuid4().hex}.tmp"
        try:
            with open(aside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
            raise

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writing(name) as stream:
            stream.write(data)

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def list(self, name: str = "") -> list[str]:
        """Names of the entries directly in a folder, sorted; none if there is no such folder."""
        selector = pafs.FileSelector(self.path(name), allow_not_found=True)
        names = [info.base_name for info in self.fs.get_file_info(selector)]
        return sorted(n for n in names if not n.endswith(".tmp"))

    def delete(self, name: str) -> None:
        """Removes a file or a whole folder; what is not there is no error."""
        info = self.fs.get_file_info(self.path(name))
        if info.type == pafs.FileType.Directory:
            self.fs.delete_dir(self.path(name))
        elif info.type == pafs.FileType.File:
            self.fs.delete_file(self.path(name))
