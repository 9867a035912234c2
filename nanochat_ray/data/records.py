"""Records of JSON lines, JSON or Parquet files: compressed or not, local or remote.

A damaged file is an error that names it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from nanochat_ray.data.corpus import DAMAGE
from nanochat_ray.data.decoding import DecompressedFile, decode, read_all
from nanochat_ray.data.formats import format_of
from nanochat_ray.data.json_text import parse
from nanochat_ray.data.sources import Source, check_regular, find, is_outside, open_filesystem
from nanochat_ray.data.tables import open_parquet

KINDS = ("jsonl", "json", "parquet")
SUFFIXES = ".jsonl, .ndjson, .json or .parquet, plain or compressed"


def find_files(uri: str, field: str) -> list[Source]:
    """The files of records that ``uri`` (a file, a folder or a glob) names.

    A folder's other files are left out. ValueError begins with ``field``.
    """
    try:
        sources = find([uri])
    except ValueError as error:
        raise ValueError(_with_field(str(error), field)) from None
    files = [source for source in sources if format_of(source.uri)[0] in KINDS]
    if not files:
        raise ValueError(f"{field}={uri!r} is not allowed: it names no file in {SUFFIXES}")
    return files


def read(source: Source, field: str) -> Iterator[tuple[str, Any]]:
    """(where it is, for messages; the record) of each record in a file, which is read whole.

    ValueError names the file, and the line or item that is no JSON.
    """
    where = f"{field} file {source.uri}"
    try:
        yield from _records(source, where)
    except Exception as error:
        is_damage = isinstance(error, (*DAMAGE, ValueError))
        if not is_damage and not is_outside(error, source.uri):
            raise
        text = _with_field(str(error).partition("\n")[0][:300] or type(error).__name__, field)
        text = text if source.uri in text else f"{where} cannot be read: {text}"
        raise ValueError(text) from None


def _with_field(message: str, field: str) -> str:
    """A message about text as one about ``field``."""
    message = message.replace("text file ", f"{field} file ", 1)
    return f"{field}={message.removeprefix('text=')}" if message.startswith("text=") else message


def _records(source: Source, where: str) -> Iterator[tuple[str, Any]]:
    fs, path = open_filesystem(source.uri)
    if isinstance(fs, pafs.LocalFileSystem):
        check_regular(path)
    kind, compression = format_of(source.uri)
    with DecompressedFile(fs, path, compression) as file:
        data = read_all(file)
    if kind == "parquet":
        parquet = open_parquet(pa.BufferReader(data), source.uri)
        number = 0
        for batch in parquet.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{where}, row {number}", row
        return
    text = decode(data, source.uri)
    if kind == "json":
        try:
            document = parse(text)
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
            value = parse(line)
        except ValueError as error:
            raise ValueError(f"{where}, line {number}: not JSON: {error}") from None
        yield f"{where}, line {number}", value
