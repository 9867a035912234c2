"""One place for everything that is kept: a folder, S3 or GCS behind the same few calls.

A ``Store`` is a root and its file system. A file appears whole or not at all: on a local disk it
is written aside and renamed, in an object store one upload is one atomic object. A folder of many
files is made whole by its manifest, which is written last (``checkpoint`` and ``data`` do that).
"""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

SCHEMES = ("file", "s3", "gs")


def default_root() -> str:
    """``$XDG_CACHE_HOME/nanochat_ray``, by default ``~/.cache/nanochat_ray``."""
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return str(Path(cache) / "nanochat_ray")


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path in it that ``uri`` names.

    A path without a scheme is a local one. S3 takes pyarrow's query fields
    (``s3://bucket/path?endpoint_override=host:port&scheme=http``); its credentials come from the
    environment, never from the URI. Raises ValueError, naming the URI, for any other scheme.
    """
    scheme = urlsplit(uri).scheme
    if not uri or (scheme and scheme not in SCHEMES and len(scheme) > 1):
        allowed = ", ".join(f"{s}://" for s in SCHEMES)
        raise ValueError(f"storage={uri!r} is not allowed: give a folder or one of {allowed}")
    if scheme in ("", "file") or len(scheme) == 1:
        path = uri.removeprefix("file://") if scheme == "file" else uri
        return pafs.LocalFileSystem(), str(Path(path).expanduser().absolute())
    if "@" in urlsplit(uri).netloc:
        raise ValueError(
            f"storage={scheme}://… holds credentials: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment instead"
        )
    try:
        return pafs.FileSystem.from_uri(uri)
    except (ValueError, OSError) as error:
        raise ValueError(f"storage={uri!r} cannot be opened: {error}") from None


@dataclass(frozen=True)
class Store:
    """A folder of a file system. Paths given to its methods are relative to it."""

    uri: str
    fs: pafs.FileSystem
    root: str

    @classmethod
    def at(cls, uri: str) -> Store:
        fs, root = filesystem(uri)
        return cls(uri, fs, root.rstrip("/"))

    def __reduce__(self) -> tuple[Any, ...]:
        # A store travels to other processes as its URI: credentials stay in their environment.
        return Store.at, (self.uri,)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def child(self, *parts: str) -> Store:
        base, mark, query = self.uri.partition("?")
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
