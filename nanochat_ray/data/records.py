"""Records from files of JSON lines, JSON or Parquet, read as text is: compressed or not, local or
not, and refused by name when damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from nanochat_ray.data import corpus
from nanochat_ray.data.formats import format_of
from nanochat_ray.data.sources import (
    Source,
    check_regular,
    find,
    is_outside,
    open_filesystem,
    open_parquet,
)

KINDS = ("jsonl", "json", "parquet")
SUFFIXES = ".jsonl, .ndjson, .json or .parquet, plain or compressed"


def find_files(uri: str, field: str) -> list[Source]:
    """The files of records that ``uri`` (a file, a folder or a glob) names.

    A folder's other files are left out. ValueError begins with ``field``.
    """
    try:
        sources = find([uri])
    except ValueError as error:
        raise ValueError(_named(str(error), field)) from None
    chosen = [source for source in sources if format_of(source.uri)[0] in KINDS]
    if not chosen:
        raise ValueError(f"{field}={uri!r} is not allowed: it names no file in {SUFFIXES}")
    return chosen


def read(source: Source, field: str) -> Iterator[tuple[str, Any]]:
    """(where it is, for messages; the record) of each record in a file, which is read whole.

    ValueError names the file, and the line or item that is no JSON.
    """
    where = f"{field} file {source.uri}"
    try:
        yield from _records(source, where)
    except Exception as error:
        if not isinstance(error, (*corpus.DAMAGE, ValueError)) and not is_outside(
            error, source.uri
        ):
            raise
        text = _named(str(error).partition("\n")[0][:300] or type(error).__name__, field)
        text = text if source.uri in text else f"{where} cannot be read: {text}"
        raise ValueError(text) from None


def _named(message: str, field: str) -> str:
    message = message.replace("text file ", f"{field} file ", 1)
    return f"{field}={message.removeprefix('text=')}" if message.startswith("text=") else message


def _records(source: Source, where: str) -> Iterator[tuple[str, Any]]:
    fs, path = open_filesystem(source.uri)
    if isinstance(fs, pafs.LocalFileSystem):
        check_regular(path)
    kind, compression = format_of(source.uri)
    with corpus.Stream(fs, path, compression) as stream:
        data = corpus.read_whole(stream)
    if kind == "parquet":
        parquet = open_parquet(pa.BufferReader(data), source.uri)
        number = 0
        for batch in parquet.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{where}, row {number}", row
        return
    text = corpus.decode(data, source.uri)
    if kind == "json":
        try:
            document = _parse(text)
        except ValueError as error:
            if "Extra data" not in str(error):  # else JSON lines under another name
                raise ValueError(f"{where} is not JSON: {error}") from None
        else:
            items = document if isinstance(document, list) else [document]
            yield from ((f"{where}, item {i}", item) for i, item in enumerate(items, 1))
            return
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = _parse(line)
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: not JSON: {error}") from None
        yield f"{where}, line {number}", value


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
