"""Documents from files of text: plain, JSON lines, Parquet or Arrow, compressed or not.

``read`` is a plain function over one unit of work; Ray Data runs it in parallel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from nanochat_ray.data.sources import (
    Source,
    Unit,
    format_of,
    is_outside,
    open_filesystem,
    open_parquet,
)


def _text_column(table: pa.Table, uri: str) -> Iterator[str]:
    if "text" not in table.column_names:
        raise ValueError(f"text file {uri} has no column 'text', only {table.column_names}")
    column = table.column("text")
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise ValueError(f"text file {uri}: its column 'text' holds {column.type}, not strings")
    for value in column:
        if value.is_valid:
            yield value.as_py()


def _decode(data: bytes, uri: str) -> str:
    zero = data.find(b"\0")
    if zero >= 0:
        raise ValueError(f"text file {uri} is binary: it holds a NUL (byte {zero})")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text file {uri} is not UTF-8 text (byte {error.start})") from None


def _json_texts(text: str, uri: str) -> Iterator[str]:
    # Not splitlines, which also cuts at characters that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
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
        # JSON can spell half a surrogate pair, which no encoder takes.
        yield found.encode("utf-8", "replace").decode()


def _lines(file: Any, start: int, stop: int) -> bytes:
    """The lines of a file that begin in [start, stop)."""

    def next_line(at: int) -> int:
        """Where the first line begins that does not begin before ``at``."""
        if at == 0:
            return 0
        at -= 1
        file.seek(at)
        while block := file.read(1 << 16):
            found = block.find(b"\n")
            if found >= 0:
                return at + found + 1
            at += len(block)
        return at

    first, last = next_line(start), next_line(stop)
    file.seek(first)
    return file.read(max(0, last - first))


def _bytes(fs: pafs.FileSystem, path: str, source: Source) -> bytes:
    if source.span is not None:
        with fs.open_input_file(path) as file:
            return _lines(file, *source.span)
    _, compression = format_of(source.uri)
    with fs.open_input_stream(path, compression=compression) as stream:
        return stream.read()


def _documents(source: Source) -> Iterator[str]:
    fs, path = open_filesystem(source.uri)
    kind, compression = format_of(source.uri)
    where = source.uri
    if source.span is not None:
        where += f" (from byte {source.span[0]:,} on)"
    if kind == "parquet" and not compression:
        with fs.open_input_file(path) as file:
            parquet = open_parquet(file, where)
            for group in source.groups or range(parquet.num_row_groups):
                yield from _text_column(parquet.read_row_group(group), where)
        return
    data = _bytes(fs, path, source)
    if source.span is None and not data.strip():
        raise ValueError(f"text file {where} is empty")
    if kind == "parquet":
        yield from _text_column(open_parquet(pa.BufferReader(data), where).read(), where)
    elif kind == "arrow":
        yield from _text_column(_arrow_table(data, where), where)
    elif kind == "jsonl":
        yield from _json_texts(_decode(data, where), where)
    else:
        yield _decode(data, where)


def read(unit: Unit) -> Iterator[str]:
    """The documents of a unit. Raises ValueError, naming the file, for one that is not text."""
    for source in unit:
        try:
            yield from _documents(source)
        except Exception as error:
            if is_outside(error, source.uri):
                raise ValueError(f"text file {source.uri} cannot be read: {error}") from None
            raise


def _arrow_table(data: bytes, uri: str) -> pa.Table:
    try:
        return pa.ipc.open_file(data).read_all()
    except pa.ArrowInvalid:
        pass
    try:
        return pa.ipc.open_stream(data).read_all()
    except pa.ArrowInvalid as error:
        raise ValueError(f"text file {uri} is not an Arrow file: {error}") from None
