"""The files of raw text, by folder, glob or URI, and their division into units of work."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow.fs as pafs

from nanochat_ray.data.decoding import OnBad
from nanochat_ray.data.formats import KNOWN, format_of, is_known
from nanochat_ray.data.tables import open_parquet
from nanochat_ray.storage import OBJECT_STORES, filesystem, join_uri, split_uri

UNIT_BYTES = 4 << 20
"""Approximate bytes of text that one task reads."""
_FILE_TYPES = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file, or a part of a large file."""

    uri: str
    size: int
    mtime_ns: int
    groups: tuple[int, ...] = ()
    """Row groups of the part (Parquet)."""
    span: tuple[int, int] | None = None
    """Bytes of the part: it has the lines that begin from the first to before the second."""

    @property
    def text_size(self) -> int:
        """Approximate bytes of text: compression and Parquet save a factor of 3."""
        kind, compression = format_of(self.uri)
        return self.size * (3 if compression or kind == "parquet" else 1)


Unit = tuple[Source, ...]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files are read."""

    text_column: str = "text"
    """Column (Parquet, Arrow, CSV, TSV) or field (JSON) that has the text."""
    skip_bad: bool = False
    """Leave out files, lines and rows that cannot be read, instead of raising an error."""


DEFAULT = ReadOptions()


@dataclass
class Unreadable:
    """Files, lines and rows that cannot be read: their number and the first messages."""

    MAX_MESSAGES = 20
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.first) < self.MAX_MESSAGES:
            self.first.append(message)

    def merge(self, other: Unreadable) -> None:
        self.count += other.count
        self.first = [*self.first, *other.first][: self.MAX_MESSAGES]


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system and the path in it; as ``storage.filesystem``, and ``hf://`` too."""
    if uri.startswith("hf://"):
        try:
            from huggingface_hub import HfFileSystem
        except ImportError:
            raise ValueError(
                f"text={uri!r} needs the Hugging Face client: pip install 'nanochat_ray[hub]'"
            ) from None
        handler = pafs.FSSpecHandler(HfFileSystem())
        return pafs.PyFileSystem(handler), uri.removeprefix("hf://")
    try:
        return filesystem(uri)
    except ValueError as error:
        raise ValueError(str(error).replace("storage=", "text=", 1)) from None


def check_regular(path: str) -> os.stat_result:
    """The status of a local file. Raises ValueError, naming it, unless it is a regular one.

    To read from a FIFO or a device may never end.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise ValueError(f"text file {path!r} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = _FILE_TYPES.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"text file {path!r} is {kind}, not a regular file")
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"text file {path!r} has a name that is not UTF-8") from None
    return status


def _matches(pattern: str) -> re.Pattern[str]:
    """A shell's glob: ``*`` and ``?`` stay inside one folder, ``**/`` is any number of folders."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    regex = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]+\]|.", pattern, re.DOTALL):
        if len(token) > 1 and token.startswith("["):
            regex += "[" + token[1:-1].replace("\\", r"\\").replace("!", "^", token[1] == "!") + "]"
        else:
            regex += wild.get(token) or re.escape(token)
    try:
        return re.compile(regex, re.DOTALL)
    except re.error as error:
        raise ValueError(f"text={pattern!r} is no glob: {error}") from None


def _select(path: str, is_folder: bool) -> tuple[str, Callable[[str], bool]]:
    """(folder to list, which files in it) for a folder or a glob."""
    if is_folder:
        return path, is_known
    wild = re.search(r"[*?\[]", path)
    if wild is None:
        raise ValueError(f"text={path!r} does not exist")
    matches = _matches(path)
    return path[: wild.start()].rpartition("/")[0], lambda name: bool(matches.fullmatch(name))


def _walk(folder: str) -> Iterator[str]:
    """Every file below a local folder; each folder once, whatever links lead to it."""
    start = os.stat(folder)
    visited_ids = {(start.st_dev, start.st_ino)}
    todo = [folder]
    while todo:
        below = todo.pop()
        real = os.path.realpath(below)
        for entry in sorted(os.scandir(below), key=lambda entry: entry.name):
            try:
                is_folder = entry.is_dir()
                status = entry.stat() if is_folder else None
            except OSError:  # a link that leads nowhere or to itself
                status = None
            if status is None:
                yield entry.path
                continue
            # A link to a folder above would bring in all that is beside this one.
            target = os.path.realpath(entry.path) if entry.is_symlink() else ""
            above = target and (real == target or real.startswith(target.rstrip("/") + "/"))
            if not above and (status.st_dev, status.st_ino) not in visited_ids:
                visited_ids.add((status.st_dev, status.st_ino))
                todo.append(entry.path)


def _local_files(uri: str, path: str) -> list[str]:
    if os.path.exists(path) and not os.path.isdir(path):
        return [path]
    folder, is_match = _select(path, os.path.isdir(path))
    if not os.path.isdir(folder or "/"):
        return []
    return sorted(name for name in _walk(folder or "/") if is_match(name))


def _remote_files(uri: str) -> list[tuple[str, pafs.FileInfo]]:
    scheme, _, options = split_uri(uri)
    fs, path = open_filesystem(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.File:
        infos = [info]
    else:
        folder, is_match = _select(path, info.type == pafs.FileType.Directory)
        selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
        entries = fs.get_file_info(selector)
        infos = [i for i in entries if i.type == pafs.FileType.File and is_match(i.path)]
    return [(join_uri(scheme, info.path, options), info) for info in infos]


def is_outside(error: Exception, uri: str) -> bool:
    """Whether an error is of the disk or network, not of the content that was read."""
    # The Hub's client raises errors of its HTTP library, which are no OSErrors.
    hub = uri.startswith("hf://") and not isinstance(error, ValueError)
    return isinstance(error, OSError) or hub


def _expand(uri: str, on_bad: OnBad) -> Iterator[tuple[Any, Source]]:
    """(identity, source) of every file that ``uri`` (a file, a folder or a glob) stands for."""
    if split_uri(uri)[0] in (*OBJECT_STORES, "hf"):
        for name, info in _remote_files(uri):
            mtime_ns = int(info.mtime_ns or 0)
            yield name, Source(uri=name, size=int(info.size or 0), mtime_ns=mtime_ns)
        return
    _, path = open_filesystem(uri)
    for name in _local_files(uri, path):
        try:
            status = check_regular(name)
        except ValueError as error:
            on_bad(str(error))
            continue
        source = Source(uri=name, size=status.st_size, mtime_ns=status.st_mtime_ns)
        yield (status.st_dev, status.st_ino) if status.st_ino else name, source


def find(
    text: Sequence[str],
    options: ReadOptions = DEFAULT,
    unreadable: Unreadable | None = None,
) -> list[Source]:
    """Every file that ``text`` names, each once, in an order that depends on the names only.

    A folder gives the files in it, at any depth, whose format is known. Raises ValueError for
    what does not exist, for an unknown format, an empty or special file, and if nothing is found;
    with ``skip_bad`` such files are added to ``unreadable`` instead.
    """
    unreadable = Unreadable() if unreadable is None else unreadable

    def on_bad(message: str) -> None:
        if not options.skip_bad:
            raise ValueError(message)
        unreadable.add(message)

    by_identity: dict[Any, Source] = {}
    for uri in text:
        before = len(by_identity), unreadable.count
        any_file = False
        try:
            for identity, source in _expand(uri, on_bad):
                any_file = True
                if identity not in by_identity or source.uri < by_identity[identity].uri:
                    by_identity[identity] = source
        except Exception as error:
            if is_outside(error, uri):
                reason = str(error).partition("\n")[0]
                raise ValueError(f"text={uri!r} cannot be listed: {reason}") from None
            raise
        if not any_file and before == (len(by_identity), unreadable.count):
            raise ValueError(f"text={uri!r} names no file of a known format ({KNOWN})")
    sources = []
    for source in sorted(by_identity.values(), key=lambda source: source.uri):
        try:
            kind, _ = format_of(source.uri)
            if source.size == 0 and kind != "code":
                raise ValueError(f"text file {source.uri} is empty")
        except ValueError as error:
            on_bad(str(error))
            continue
        if source.size:  # an empty source file, such as __init__.py, is no error
            sources.append(source)
    if not sources:
        raise ValueError(f"text={', '.join(text)!r:.200} has no file that can be read")
    return sources


def _is_wide(source: Source) -> bool:
    """Whether a text file is UTF-16 or UTF-32 by its byte order mark, so not splittable."""
    fs, path = open_filesystem(source.uri)
    with fs.open_input_file(path) as file:
        return file.read(2) in (b"\xff\xfe", b"\xfe\xff") or file.read(2) == b"\xfe\xff"


def _parts(source: Source, unit_bytes: int) -> list[Source]:
    """Parts of a large file that can be read separately; the file itself if it has none."""
    kind, compression = format_of(source.uri)
    if source.size <= 2 * unit_bytes or compression:
        return [source]
    if kind == "parquet":
        fs, path = open_filesystem(source.uri)
        with fs.open_input_file(path) as file:
            count = open_parquet(file, source.uri).metadata.num_row_groups
        if count == 0:
            return [source]
        stride = max(1, count * unit_bytes // source.size)
        groups = [tuple(range(at, min(at + stride, count))) for at in range(0, count, stride)]
        size = source.size // len(groups)
        return [replace(source, groups=group, size=size) for group in groups]
    if kind not in ("text", "code", "jsonl") or _is_wide(source):
        return [source]
    spans = [(at, min(at + unit_bytes, source.size)) for at in range(0, source.size, unit_bytes)]
    return [replace(source, span=span, size=span[1] - span[0]) for span in spans]


def _parts_or_whole(source: Source, unit_bytes: int, skip_bad: bool) -> list[Source]:
    try:
        return _parts(source, unit_bytes)
    except Exception as error:
        if skip_bad:
            return [source]  # the task that reads it names it
        if is_outside(error, source.uri):
            raise ValueError(f"text file {source.uri} cannot be read: {error}") from None
        raise


def units(sources: Sequence[Source], *, skip_bad: bool = False) -> list[Unit]:
    """Units of about equal size: groups of small files, parts of large ones.

    A unit has about ``UNIT_BYTES``, and more where there would be thousands of units: each shard
    is gathered from the shuffle parts of all. A task holds several times its unit in memory.
    """
    total = sum(source.size for source in sources)
    unit_bytes = min(max(UNIT_BYTES, total // 1024), 16 * UNIT_BYTES)
    result: list[Unit] = []
    unit: list[Source] = []
    size = 0
    for source in sources:
        for part in _parts_or_whole(source, unit_bytes, skip_bad):
            if unit and size + part.size > unit_bytes:
                result.append(tuple(unit))
                unit, size = [], 0
            unit.append(part)
            size += part.size
    return [*result, tuple(unit)] if unit else result
