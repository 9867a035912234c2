"""Storage: a local folder, S3 or GCS behind one small interface.

A ``Store`` is a root URI and its file system. Writing a file is atomic: on a local disk it is
written to a temporary file and renamed, in an object store one upload is one object. Folders of
many files have a manifest, which is written last (``checkpoint`` and ``data`` do that).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow.fs as pafs

from nanochat_ray import conditional
from nanochat_ray.checks import check_name, require, short_repr

SCHEMES = ("file", "s3", "gs")
OBJECT_STORES = ("s3", "gs")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):")  # one letter would be a drive of Windows
_OPTIONS = re.compile(r"[a-z_]+=[^&?]*(&[a-z_]+=[^&?]*)*")


def user_folder(variable: str, default: str) -> Path:
    """The folder that a variable of the XDG specification names, by default one of the home.

    ValueError for a user who has no home: with a number that no table of users has, as in a
    container, and without HOME.
    """
    folder = os.environ.get(variable, "")
    if os.path.isabs(folder):  # the specification: a relative path is to be ignored
        return Path(folder)
    try:
        return Path.home() / default
    except RuntimeError:
        raise ValueError(f"this user has no home folder: set HOME or {variable}") from None


def cache_root() -> Path:
    """``$XDG_CACHE_HOME/nanochat_ray``, by default ``~/.cache/nanochat_ray``."""
    return user_folder("XDG_CACHE_HOME", ".cache") / "nanochat_ray"


def default_root() -> str:
    """``$NANOCHAT_STORAGE``, else ``cache_root()``: where datasets, tokenizers and runs are stored,
    unless a flag says otherwise."""
    if root := os.environ.get("NANOCHAT_STORAGE"):
        return root
    try:
        return str(cache_root())
    except ValueError:
        return "~/.cache/nanochat_ray"  # an error for who uses it; a flag may name another


def split_uri(uri: str) -> tuple[str, str, str]:
    """(scheme, path, options) of a URI; only a ``file:`` path is decoded.

    The scheme is empty for a local path, which may hold any character. Object keys may too, so
    only a text in the form of pyarrow's fields (``name=value&…``) after the last ``?`` counts as
    options; a key that ends in such a text is written with one more ``?`` after it.
    """
    match = _SCHEME.match(uri)
    if match is None:
        return "", uri, ""
    scheme, rest = match[1].lower(), uri[match.end() :]
    if scheme == "file":
        path = rest[2:].removeprefix("localhost/") if rest.startswith("//") else rest
        return scheme, unquote("/" + path if rest.startswith("//localhost/") else path), ""
    rest = rest.removeprefix("//")
    path, mark, options = rest.rpartition("?")
    if scheme in OBJECT_STORES and mark and (not options or _OPTIONS.fullmatch(options)):
        return scheme, path, options
    return scheme, rest, ""


def join_uri(scheme: str, path: str, options: str) -> str:
    """The inverse of ``split_uri``."""
    if scheme in ("", "file"):
        return path
    mark = "?" if options or (scheme in OBJECT_STORES and "?" in path) else ""
    return f"{scheme}://{path}{mark}{options}"


def absolute(uri: str) -> str:
    """``uri`` in a form that does not depend on the working directory or home of a process.

    A local path, with or without ``file://``, becomes an absolute one with ``~`` expanded; other
    URIs stay as they are. Raises ValueError, naming the URI, for a scheme that is not supported.
    """
    schemes = ", ".join(f"{s}://" for s in SCHEMES)
    require(isinstance(uri, str), "storage", uri, f"a folder or one of {schemes}")
    scheme, path, _ = split_uri(uri)
    ok = bool(uri) and "\0" not in uri and (not scheme or scheme in SCHEMES)
    require(ok, "storage", uri, f"give a folder or one of {schemes}")
    if scheme in OBJECT_STORES:
        return uri
    if scheme == "file" and uri[5:].startswith("//"):  # RFC 8089: what follows is a host
        rule = "file:// is followed by an absolute path (file:///folder), or give the path alone"
        require(path.startswith(("/", "~")), "storage", uri, rule)
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError as error:  # ~nobody
        raise ValueError(f"storage={short_repr(uri)} is not allowed: {error}") from None


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path in it that ``uri`` names.

    A path without a scheme is a local one. S3 takes pyarrow's query fields
    (``s3://bucket/path?endpoint_override=host:port&scheme=http``); its credentials come from the
    environment, never from the URI. ``%`` in keys is not decoded.
    Raises ValueError, naming the URI, for any other scheme.
    """
    uri = absolute(uri)
    scheme, path, options = split_uri(uri)
    if uri.startswith("/") or scheme not in OBJECT_STORES:
        return pafs.LocalFileSystem(), uri
    bucket = path.partition("/")[0]
    if "@" in bucket:
        raise ValueError(
            f"storage={scheme}://… holds credentials: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY in the environment instead"
        )
    require(bool(bucket), "storage", uri, f"{scheme}://bucket or a folder of it")
    try:
        # Calls to an endpoint that does not answer fail after about 10 s, by pyarrow's defaults.
        fs, _ = pafs.FileSystem.from_uri(join_uri(scheme, bucket, options))
    except (ValueError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"storage={short_repr(uri)} cannot be opened: {reason}") from None
    return fs, path.rstrip("/")


@dataclass(frozen=True)
class Store:
    """A folder of a file system. Its methods take paths relative to it."""

    uri: str
    fs: pafs.FileSystem
    root: str

    @classmethod
    def at(cls, uri: str) -> Store:
        fs, root = filesystem(uri)
        scheme, path, options = split_uri(uri)
        if scheme in OBJECT_STORES:
            return cls(join_uri(scheme, path.rstrip("/"), options), fs, root)
        return cls(absolute(uri), fs, root.rstrip("/"))

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled as its URI: credentials stay in the environment of each process.
        return Store.at, (self.uri,)

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, pafs.LocalFileSystem)

    def child(self, *names: str) -> Store:
        """The folder at the path ``names`` below this one. ValueError if one is no name."""
        for name in names:
            check_name("name", name)
        root = "/".join([self.root, *names])
        if self.is_local:
            return Store(root, self.fs, root)
        scheme, path, options = split_uri(self.uri)
        return Store(join_uri(scheme, "/".join([path, *names]), options), self.fs, root)

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
        with self.open_input(name) as file:
            return file.read()

    def read_text(self, name: str) -> str:
        return self.read_bytes(name).decode()

    def open_input(self, name: str) -> Any:
        """A seekable pyarrow file. Raises FileNotFoundError."""
        self.size(name)
        return self.fs.open_input_file(self.path(name))

    def local_path(self, name: str) -> Path | None:
        """The file's path on this machine, so that it can be memory-mapped, or None."""
        return Path(self.path(name)) if self.is_local else None

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Any]:
        """A writable file that appears under its name only when the block ends without error."""
        target = self.path(name)
        if not self.is_local:
            # pyarrow cannot abort an upload: after an error a truncated object may remain, which no
            # manifest names. ``write_bytes`` sends its data in one request, so it is atomic.
            # Without compression=None pyarrow would gzip every file called .gz.
            with self.fs.open_output_stream(target, compression=None) as file:
                yield file
            return
        self.fs.create_dir(os.path.dirname(target), recursive=True)
        with _write_aside(target, os.replace) as file:
            yield file

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.writing(name) as file:
            file.write(data)

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def create(self, name: str, data: bytes) -> bool:
        """Writes a file that does not exist yet; False if it does. Of concurrent calls for one file
        only one gets True: a hard link in a folder, a conditional put in an object store. Without
        hard links, others may see the file before its content."""
        target = self.path(name)
        if not self.is_local:
            region = self.fs.region if isinstance(self.fs, pafs.S3FileSystem) else ""
            return conditional.create(*split_uri(self.uri), name, data, region=region)
        self.fs.create_dir(os.path.dirname(target), recursive=True)
        try:
            with _write_aside(target, _link) as file:
                file.write(data)
        except FileExistsError:
            return False
        return True

    def list(self, name: str = "") -> list[str]:
        """Names of the entries directly in a folder, sorted; none if there is no such folder."""
        selector = pafs.FileSelector(self.path(name), allow_not_found=True)
        names = [info.base_name for info in self.fs.get_file_info(selector)]
        return sorted(n for n in names if not n.endswith(".tmp"))

    def delete(self, name: str) -> None:
        """Deletes a file or a folder with its content; a missing one is no error."""
        info = self.fs.get_file_info(self.path(name))
        if info.type == pafs.FileType.Directory:
            self.fs.delete_dir(self.path(name))
        elif info.type == pafs.FileType.File:
            self.fs.delete_file(self.path(name))


def _link(source: str, target: str) -> None:
    """Gives a file a second name. FileExistsError if there is a file of that name."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        # A file system without hard links: exFAT, SMB, a bucket that is mounted.
        with open(source, "rb") as content, open(target, "xb") as file:
            shutil.copyfileobj(content, file)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def _write_aside(target: str, publish: Callable[[str, str], None]) -> Iterator[Any]:
    """A writable file, to which ``publish`` gives the name ``target`` behind the block."""
    aside = f"{target}.{uuid.uuid4().hex}.tmp"
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(aside, target)
        sync_folder(os.path.dirname(target))
    except BaseException as error:
        name_file(error, target)
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)


class HashingFile(io.RawIOBase):
    """A file that counts and hashes the bytes that are written to it or read from it."""

    def __init__(self, file: Any):
        self.file, self.sha256, self.size = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def _pass(self, data: Any) -> Any:
        self.sha256.update(data)
        self.size += memoryview(data).nbytes
        return data

    def write(self, data: Any) -> int:
        self.file.write(self._pass(data))
        return len(data)

    def read(self, size: int = -1) -> bytes:
        return self._pass(self.file.read(None if size < 0 else size))


def sync_folder(path: str | Path) -> None:
    """After a loss of power too, the folder has the names that it has now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):  # some file systems sync files alone
            raise
    finally:
        os.close(descriptor)


def name_file(error: BaseException, path: str) -> None:
    """A write that fails (a full disk, a quota) names no file by itself."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        error.filename = path
