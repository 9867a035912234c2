"""Where raw text comes from: files, folders, globs and URIs, cut into units of work."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from nanochat_ray.data.formats import KNOWN, format_of, is_known
from nanochat_ray.storage import OBJECT_STORES, filesystem, join_uri, split_uri

UNIT_BYTES = 4 << 20
"""Text that one task reads, about."""
_FILE_TYPES = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file, or a part of a large one."""

    uri: str
    size: int
    modified: int
    groups: tuple[int, ...] = ()
    """The part's row groups (Parquet)."""
    span: tuple[int, int] | None = None
    """The part's bytes: it has the lines that begin from the first to before the second."""

    @property
    def text_size(self) -> int:
        """Bytes of text in it, about: compression and Parquet save a factor of 3."""
        kind, compression = format_of(self.uri)
        return self.size * (3 if compression or kind == "parquet" else 1)


Unit = tuple[Source, ...]


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How files are read."""

    text_column: str = "text"
    """Column (Parquet, Arrow, CSV, TSV) or field (JSON) that has the text."""
    skip_bad: bool = False
    """Leave out files, lines and rows that cannot be read, instead of refusing them."""


DEFAULT = ReadOptions()


@dataclass
class Skipped:
    """What was left out because it cannot be read: how much, and the first of it by name."""

    NAMED = 20
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.first) < self.NAMED:
            self.first.append(message)

    def merge(self, other: Skipped) -> None:
        self.count += other.count
        self.first = [*self.first, *other.first][: self.NAMED]


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
    made = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]+\]|.", pattern, re.DOTALL):
        if len(token) > 1 and token.startswith("["):
            made += "[" + token[1:-1].replace("\\", r"\\").replace("!", "^", token[1] == "!") + "]"
        else:
            made += wild.get(token) or re.escape(token)
    try:
        return re.compile(made, re.DOTALL)
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
    entered = {(start.st_dev, start.st_ino)}
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
            if not above and (status.st_dev, status.st_ino) not in entered:
                entered.add((status.st_dev, status.st_ino))
                todo.append(entry.path)


def _local_files(uri: str, path: str) -> list[str]:
    if os.path.exists(path) and not os.path.isdir(path):
        return [path]
    folder, wanted = _select(path, os.path.isdir(path))
    if not os.path.isdir(folder or "/"):
        return []
    return sorted(name for name in _walk(folder or "/") if wanted(name))


def _remote_files(uri: str) -> list[tuple[str, pafs.FileInfo]]:
    scheme, _, options = split_uri(uri)
    fs, path = open_filesystem(uri)
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.File:
        infos = [info]
    else:
        folder, wanted = _select(path, info.type == pafs.FileType.Directory)
        selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
        listed = fs.get_file_info(selector)
        infos = [i for i in listed if i.type == pafs.FileType.File and wanted(i.path)]
    return [(join_uri(scheme, info.path, options), info) for info in infos]


def is_outside(error: Exception, uri: str) -> bool:
    """Whether an error came from disk or network, not from what was found there."""
    # The Hub's client lets the errors of its HTTP library through, which are no OSErrors.
    hub = uri.startswith("hf://") and not isinstance(error, ValueError)
    return isinstance(error, OSError) or hub


def _expand(uri: str, bad: Callable[[str], None]) -> Iterator[tuple[Any, Source]]:
    """(identity, source) of every file that ``uri`` (a file, a folder or a glob) stands for."""
    if split_uri(uri)[0] in (*OBJECT_STORES, "hf"):
        for name, info in _remote_files(uri):
            modified = int(info.mtime_ns or 0)
            yield name, Source(uri=name, size=int(info.size or 0), modified=modified)
        return
    _, path = open_filesystem(uri)
    for name in _local_files(uri, path):
        try:
            status = check_regular(name)
        except ValueError as error:
            bad(str(error))
            continue
        source = Source(uri=name, size=status.st_size, modified=status.st_mtime_ns)
        yield (status.st_dev, status.st_ino) if status.st_ino else name, source


def find(
    text: Sequence[str],
    options: ReadOptions = DEFAULT,
    skipped: Skipped | None = None,
) -> list[Source]:
    """Every file that ``text`` names, each once, in an order that depends on the names alone.

    A folder gives the files in it, at any depth, whose format is known. Raises ValueError for
    what does not exist, for an unknown format, an empty or special file, and if nothing is found;
    with ``skip_bad`` such files are added to ``skipped`` instead.
    """
    skipped = Skipped() if skipped is None else skipped

    def bad(message: str) -> None:
        if not options.skip_bad:
            raise ValueError(message)
        skipped.add(message)

    chosen: dict[Any, Source] = {}
    for uri in text:
        before = len(chosen), skipped.count
        any_file = False
        try:
            for identity, source in _expand(uri, bad):
                any_file = True
                if identity not in chosen or source.uri < chosen[identity].uri:
                    chosen[identity] = source
        except Exception as error:
            if is_outside(error, uri):
                reason = str(error).partition("\n")[0]
                raise ValueError(f"text={uri!r} cannot be listed: {reason}") from None
            raise
        if not any_file and before == (len(chosen), skipped.count):
            raise ValueError(f"text={uri!r} names no file of a known format ({KNOWN})")
    sources = []
    for source in sorted(chosen.values(), key=lambda source: source.uri):
        try:
            kind, _ = format_of(source.uri)
            if source.size == 0 and kind != "code":
                raise ValueError(f"text file {source.uri} is empty")
        except ValueError as error:
            bad(str(error))
            continue
        if source.size:  # an empty source file, such as __init__.py, is nothing wrong
            sources.append(source)
    if not sources:
        raise ValueError(f"text={', '.join(text)!r:.200} has no file that can be read")
    return sources


def open_parquet(file: Any, uri: str) -> pq.ParquetFile:
    try:
        # Read as a stream of pages, not a row group at once; checksums are checked where there are.
        return pq.ParquetFile(
            file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"text file {uri} is not a Parquet file: {reason}") from None


def _is_wide(source: Source) -> bool:
    """Whether a text file is UTF-16 or UTF-32, by its mark: it is not cut at bytes."""
    fs, path = open_filesystem(source.uri)
    with fs.open_input_file(path) as file:
        return file.read(2) in (b"\xff\xfe", b"\xfe\xff") or file.read(2) == b"\xfe\xff"


def _parts(source: Source, unit_bytes: int) -> list[Source]:
    """A large file in parts that can be read apart; one that cannot be cut stays whole."""
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
            return [source]  # whoever reads it names it
        if is_outside(error, source.uri):
            raise ValueError(f"text file {source.uri} cannot be read: {error}") from None
        raise


def units(sources: Sequence[Source], *, skip_bad: bool = False) -> list[Unit]:
    """Sources grouped (small files) or cut (large ones) into tasks of about equal size.

    At least ``UNIT_BYTES`` each, and larger where there would be thousands: every task writes a
    part for each shard.
    """
    total = sum(source.size for source in sources)
    unit_bytes = min(max(UNIT_BYTES, total // 1024), 64 * UNIT_BYTES)
    made: list[Unit] = []
    open_unit: list[Source] = []
    filled = 0
    for source in sources:
        for part in _parts_or_whole(source, unit_bytes, skip_bad):
            if open_unit and filled + part.size > unit_bytes:
                made.append(tuple(open_unit))
                open_unit, filled = [], 0
            open_unit.append(part)
            filled += part.size
    return [*made, tuple(open_unit)] if open_unit else made
