"""Where raw text comes from: files, folders, globs and URIs, as documents.

``find`` lists the sources and cuts them into units of work; ``read`` gives the documents of one
unit. Both are plain functions: Ray Data runs ``read`` in parallel.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """One file; ``groups`` are the row groups of a Parquet file that belong to it."""

    uri: str
    size: int
    modified: int
    groups: tuple[int, ...] = ()


Unit = tuple[Source, ...]


def _open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    if uri.startswith("hf://"):
        try:
            from huggingface_hub import HfFileSystem
        except ImportError:
            raise ValueError(
                f"text={uri!r} needs the Hugging Face client: pip install 'nanochat_ray[hub]'"
            ) from None
        handler = pafs.FSSpecHandler(HfFileSystem())
        return pafs.PyFileSystem(handler), uri.removeprefix("hf://")
    return filesystem(uri)


def format_of(name: str) -> tuple[str, str | None]:
    """(format, compression) by a file's name. Raises ValueError, naming it and what is known."""
    parts = name.lower().rsplit("/", 1)[-1].split(".")
    compression = COMPRESSION.get(parts[-1])
    if compression:
        parts.pop()
    if len(parts) < 2 or parts[-1] not in FORMATS:
        raise ValueError(
            f"text file {name} has a format that is not known: give .{', .'.join(FORMATS)}, "
            f"plain or with .{', .'.join(COMPRESSION)}"
        )
    return parts[-1], compression


def _known(name: str) -> bool:
    try:
        format_of(name)
    except ValueError:
        return False
    return True


def _expand(uri: str) -> list[tuple[str, pafs.FileInfo]]:
    """(URI, info) of every file that ``uri`` (a file, a folder or a glob) stands for."""
    fs, path = _open_filesystem(uri)
    query = "?" + uri.partition("?")[2] if uri.startswith(("s3://", "gs://")) and "?" in uri else ""
    scheme = uri.partition("://")[0] + "://" if "://" in uri else ""

    def named(info: pafs.FileInfo) -> tuple[str, pafs.FileInfo]:
        return f"{scheme}{info.path}{query}", info

    globbed = any(c in path for c in "*[") or ("?" in path and not query)
    if globbed:
        cut = min(path.index(c) for c in "*?[" if c in path)
        base = path[:cut].rpartition("/")[0]
        selector = pafs.FileSelector(base, recursive=True, allow_not_found=True)
        return [
            named(info)
            for info in fs.get_file_info(selector)
            if info.type == pafs.FileType.File and fnmatch.fnmatch(info.path, path)
        ]
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise ValueError(f"text={uri!r} does not exist")
    if info.type == pafs.FileType.File:
        return [named(info)]
    selector = pafs.FileSelector(path, recursive=True)
    return [
        named(info)
        for info in fs.get_file_info(selector)
        if info.type == pafs.FileType.File and _known(info.path)
    ]


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


def units(sources: Sequence[Source]) -> list[Unit]:
    """Sources grouped (small files) or cut (row groups of large Parquet files) into tasks."""
    made: list[Unit] = []
    small: list[Source] = []
    for source in sources:
        if format_of(source.uri.partition("?")[0])[0] == "parquet" and source.size > UNIT_BYTES:
            fs, path = _open_filesystem(source.uri)
            with fs.open_input_file(path) as file:
                count = pq.ParquetFile(file).metadata.num_row_groups
            stride = max(1, count * UNIT_BYTES // source.size)
            for at in range(0, count, stride):
                groups = tuple(range(at, min(at + stride, count)))
                made.append((Source(**{**source.__dict__, "groups": groups}),))
            continue
        if small and sum(s.size for s in small) + source.size > UNIT_BYTES:
            made.append(tuple(small))
            small = []
        small.append(source)
    if small:
        made.append(tuple(small))
    return made


def _text_column(table: pa.Table, uri: str) -> Iterator[str]:
    if "text" not in table.column_names:
        raise ValueError(f"text file {uri} has no column 'text', only {table.column_names}")
    for value in table.column("text"):
        if value.is_valid:
            yield value.as_py()


def _decode(data: bytes, uri: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {uri} is not UTF-8 text (byte {error.start})") from None
    if "\0" in text:
        raise ValueError(
            f"text file {uri} is binary: it holds a NUL at character {text.index(chr(0))}"
        )
    return text


def _json_texts(text: str, uri: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found: Any = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            found = None
        if not isinstance(found, str):
            raise ValueError(
                f"text file {uri}, line {number}: not a JSON object with a text in 'text'"
            )
        yield found


def read(unit: Unit) -> Iterator[str]:
    """The documents of a unit. Raises ValueError, naming the file, for one that is not text."""
    for source in unit:
        fs, path = _open_filesystem(source.uri)
        kind, compression = format_of(path)
        if kind == "parquet":
            with fs.open_input_file(path) as file:
                parquet = pq.ParquetFile(file)
                groups = list(source.groups) or list(range(parquet.num_row_groups))
                yield from _text_column(parquet.read_row_groups(groups), source.uri)
            continue
        with fs.open_input_stream(path, compression=compression) as stream:
            data = stream.read()
        if kind == "arrow":
            yield from _text_column(_arrow_table(data, source.uri), source.uri)
        elif kind == "jsonl":
            yield from _json_texts(_decode(data, source.uri), source.uri)
        else:
            text = _decode(data, source.uri)
            if not text.strip():
                raise ValueError(f"text file {source.uri} is empty")
            yield text


def _arrow_table(data: bytes, uri: str) -> pa.Table:
    try:
        return pa.ipc.open_file(data).read_all()
    except pa.ArrowInvalid:
        pass
    try:
        return pa.ipc.open_stream(data).read_all()
    except pa.ArrowInvalid as error:
        raise ValueError(f"text file {uri} is not an Arrow file: {error}") from None


def cut(document: str, longest: int) -> list[str]:
    """A document in pieces of at most about ``longest`` characters, cut at blank lines or lines."""
    made = []
    while len(document) > longest:
        at = document.rfind("\n\n", longest // 2, longest) + 2
        if at < 2:
            at = document.rfind("\n", longest // 2, longest) + 1
        if at < 1:
            at = longest
        made.append(document[:at])
        document = document[at:]
    return [*made, document] if document.strip() else made
