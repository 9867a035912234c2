"""Where raw text comes from: files, folders, globs and URIs, cut into units of work."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from nanochat_ray.storage import filesystem

FORMATS = ("txt", "md", "jsonl", "parquet", "arrow")
COMPRESSION = {"gz": "gzip", "bz2": "bz2", "zst": "zstd", "lz4": "lz4"}
UNIT_BYTES = 4 << 20
"""Text that one task reads, about."""


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
        """Bytes of text in the whole file, about: compression and Parquet save a factor of 3."""
        kind, compression = format_of(self.uri)
        return self.size * (3 if compression or kind == "parquet" else 1)


Unit = tuple[Source, ...]


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


def format_of(name: str) -> tuple[str, str | None]:
    """(format, compression) by a file's name. Raises ValueError, naming it and what is known."""
    path = name.partition("?")[0] if "://" in name else name
    parts = path.lower().rsplit("/", 1)[-1].split(".")
    compression = COMPRESSION.get(parts[-1])
    if compression:
        parts.pop()
    if len(parts) < 2 or parts[-1] not in FORMATS:
        raise ValueError(
            f"text file {name} has a format that is not known: give .{', .'.join(FORMATS)}, "
            f"plain or with .{', .'.join(COMPRESSION)}"
        )
    return parts[-1], compression


def is_outside(error: Exception, uri: str) -> bool:
    """Whether an error came from disk or network, not from what was found there."""
    # The Hub's client lets the errors of its HTTP library through, which are no OSErrors.
    hub = uri.startswith("hf://") and not isinstance(error, ValueError)
    return isinstance(error, OSError) or hub


def _known(name: str) -> bool:
    try:
        format_of(name)
    except ValueError:
        return False
    return True


def _matches(pattern: str) -> re.Pattern[str]:
    """A shell's glob: ``*`` and ``?`` stay inside one folder, ``**/`` is any number of folders."""
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    made = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[[^]]+\]|.", pattern, re.DOTALL):
        if len(token) > 1 and token.startswith("["):
            made += "[" + token[1:-1].replace("\\", r"\\").replace("!", "^", token[1] == "!") + "]"
        else:
            made += wild.get(token) or re.escape(token)
    return re.compile(made)


def _expand(uri: str) -> list[tuple[str, pafs.FileInfo]]:
    """(URI, info) of every file that ``uri`` (a file, a folder or a glob) stands for."""
    scheme = uri.partition("://")[0] if "://" in uri else ""
    if scheme in ("s3", "gs"):
        # What follows "?" are the file system's options there, so a glob has * and [] only.
        plain, options, query = uri.partition("?")
        path = plain.partition("://")[2].rstrip("/")
        fs, _ = open_filesystem(f"{scheme}://{path.partition('/')[0]}{options}{query}")
        prefix, suffix = f"{scheme}://", options + query
    else:
        fs, path = open_filesystem(uri)
        prefix, suffix = ("hf://", "") if scheme == "hf" else ("", "")

    def named(info: pafs.FileInfo) -> tuple[str, pafs.FileInfo]:
        return f"{prefix}{info.path}{suffix}", info

    def below(folder: str) -> list[pafs.FileInfo]:
        selector = pafs.FileSelector(folder, recursive=True, allow_not_found=True)
        return [i for i in fs.get_file_info(selector) if i.type == pafs.FileType.File]

    try:
        info = fs.get_file_info(path)
        if info.type == pafs.FileType.File:
            return [named(info)]
        if info.type == pafs.FileType.Directory:
            return [named(i) for i in below(path) if _known(i.path)]
        wild = re.search(r"[*?\[]", path)
        if wild is None:
            raise ValueError(f"text={uri!r} does not exist")
        matches = _matches(path)
        found = below(path[: wild.start()].rpartition("/")[0])
        return [named(i) for i in found if matches.fullmatch(i.path)]
    except Exception as error:
        if is_outside(error, uri):
            raise ValueError(f"text={uri!r} cannot be listed: {error}") from None
        raise


def find(text: Sequence[str]) -> list[Source]:
    """Every file that ``text`` names, each once, in an order that depends on the names alone.

    A folder gives the files in it, at any depth, whose format is known. Raises ValueError for
    what does not exist, for an unknown format, an empty file, and if nothing is found.
    """
    found: dict[str, pafs.FileInfo] = {}
    for uri in text:
        matched = _expand(uri)
        if not matched:
            raise ValueError(
                f"text={uri!r} names no file of a known format (.{', .'.join(FORMATS)})"
            )
        found.update(matched)
    sources = []
    for uri in sorted(found):
        info = found[uri]
        format_of(info.path)
        if info.size == 0:
            raise ValueError(f"text file {uri} is empty")
        modified = int(info.mtime_ns or 0)
        sources.append(Source(uri=uri, size=int(info.size or 0), modified=modified))
    return sources


def open_parquet(file: Any, uri: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowInvalid as error:
        raise ValueError(f"text file {uri} is not a Parquet file: {error}") from None


def _parts(source: Source, unit_bytes: int) -> list[Source]:
    """A large file in parts that can be read apart; one that cannot be cut stays whole."""
    kind, compression = format_of(source.uri)
    if source.size <= 2 * unit_bytes or compression or kind == "arrow":
        return [source]
    if kind == "parquet":
        fs, path = open_filesystem(source.uri)
        with fs.open_input_file(path) as file:
            count = open_parquet(file, source.uri).metadata.num_row_groups
        stride = max(1, count * unit_bytes // source.size)
        groups = [tuple(range(at, min(at + stride, count))) for at in range(0, count, stride)]
        size = source.size // len(groups)
        return [replace(source, groups=group, size=size) for group in groups]
    spans = [(at, min(at + unit_bytes, source.size)) for at in range(0, source.size, unit_bytes)]
    return [replace(source, span=span, size=span[1] - span[0]) for span in spans]


def units(sources: Sequence[Source]) -> list[Unit]:
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
        for part in _parts(source, unit_bytes):
            if open_unit and filled + part.size > unit_bytes:
                made.append(tuple(open_unit))
                open_unit, filled = [], 0
            open_unit.append(part)
            filled += part.size
    return [*made, tuple(open_unit)] if open_unit else made
