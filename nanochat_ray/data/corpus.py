"""The documents of a unit of work: each file by its format, compressed or not.

``read`` is a plain function that tasks run in parallel. Files are read sequentially where their
format allows it, so that memory holds about one document. What is no text is an error that names
the file, or is left out and counted.
"""

from __future__ import annotations

import csv
import lzma
import zlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from nanochat_ray.data import json_text, markup, plain_text, tables
from nanochat_ray.data.decoding import DecompressedFile, OnBad, lines_of, read_all, read_blocks
from nanochat_ray.data.formats import Kind, format_of
from nanochat_ray.data.sources import (
    DEFAULT,
    ReadOptions,
    Source,
    Unit,
    Unreadable,
    check_regular,
    is_outside,
    open_filesystem,
)

DAMAGE = (pa.ArrowException, lzma.LZMAError, zlib.error, EOFError, csv.Error, RecursionError)
"""Errors of libraries that mean a damaged file."""


def _span_documents(
    file: Any, span: tuple[int, int], kind: Kind, where: str, column: str, on_bad: OnBad
) -> Iterator[str]:
    """The documents of a part of a file of JSON lines or plain text."""
    if kind == "jsonl":
        where += f" (from byte {span[0]:,} on)"
        first, last = (plain_text.line_start(file, at) for at in span)
        file.seek(first)
        lines = iter(file.read(max(0, last - first)).split(b"\n"))
        yield from json_text.documents_of_lines(lines, where, column, on_bad)
        return
    for block in plain_text.block_spans(span):
        try:
            yield plain_text.read_block(file, block, where)
        except ValueError as error:
            on_bad(str(error))


def _file_documents(
    file: Any, source: Source, kind: Kind, column: str, on_bad: OnBad
) -> Iterator[str]:
    """The documents of a file's decompressed bytes."""
    where = source.uri
    if kind in ("text", "code"):
        yield from plain_text.documents(file, where)
    elif kind == "jsonl":
        lines = lines_of(read_blocks(file))
        yield from json_text.documents_of_lines(lines, where, column, on_bad)
    elif kind in ("csv", "tsv"):
        delimiter = "," if kind == "csv" else "\t"
        yield from tables.csv_documents(file, delimiter, where, column, on_bad)
    elif kind == "json":
        yield from json_text.documents(read_all(file), where, column, on_bad)
    elif kind == "html":
        text = markup.text_of(markup.decode_page(read_all(file), where))
        if not text.strip():
            raise ValueError(f"text file {where} has no text in its HTML")
        yield text
    elif kind == "parquet":
        data = pa.BufferReader(read_all(file))
        yield from tables.parquet_documents(data, source.groups, where, column, on_bad)
    else:
        yield from tables.arrow_documents(read_all(file), where, column, on_bad)


def _documents(source: Source, column: str, on_bad: OnBad) -> Iterator[str]:
    fs, path = open_filesystem(source.uri)
    if isinstance(fs, pafs.LocalFileSystem):
        check_regular(path)
    kind, compression = format_of(source.uri)
    if source.span is not None:
        with fs.open_input_file(path) as file:
            yield from _span_documents(file, source.span, kind, source.uri, column, on_bad)
    elif kind == "parquet" and not compression:
        with fs.open_input_file(path) as file:
            groups = source.groups
            yield from tables.parquet_documents(file, groups, source.uri, column, on_bad)
    else:
        with DecompressedFile(fs, path, compression) as file:
            yield from _file_documents(file, source, kind, column, on_bad)


def read(
    unit: Unit,
    options: ReadOptions = DEFAULT,
    unreadable: Unreadable | None = None,
) -> Iterator[str]:
    """The documents of a unit. Raises ValueError, naming the file, for what is not text.

    With ``skip_bad`` that is added to ``unreadable`` instead: only a line or row where the rest of
    its file can be read, else the rest of the file.
    """
    unreadable = Unreadable() if unreadable is None else unreadable

    def on_bad(message: str) -> None:
        if not options.skip_bad:
            raise ValueError(message)
        unreadable.add(message)

    for source in unit:
        try:
            yield from _documents(source, options.text_column, on_bad)
        except Exception as error:
            is_ours = isinstance(error, ValueError) and source.uri in str(error)
            is_damage = isinstance(error, (*DAMAGE, ValueError))
            if not is_damage and not is_outside(error, source.uri):
                raise
            reason = str(error).partition("\n")[0][:300] or type(error).__name__
            message = str(error) if is_ours else f"text file {source.uri} cannot be read: {reason}"
            if not options.skip_bad:
                raise ValueError(message) from None
            unreadable.add(message)
