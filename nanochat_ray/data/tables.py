"""Documents of tables: CSV, TSV, Parquet and Arrow files with a column of text."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat_ray.data import decoding
from nanochat_ray.data.decoding import OnBad, encoding_of


def _check_column(names: Sequence[str], column: str, where: str) -> None:
    if column not in names:
        raise ValueError(
            f"text file {where} has no column {column!r}, only {repr(list(names))[:200]}; "
            "--text-column names another"
        )


class _HeadAndRest(io.RawIOBase):
    """Bytes that were read ahead, then the file that they came from."""

    def __init__(self, head: bytes, file: Any):
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)]
        self._head = self._head[len(data) :]
        if not data:
            data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def csv_documents(
    file: Any, delimiter: str, where: str, column: str, on_bad: OnBad
) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    head = file.read(4)
    buffer = io.BufferedReader(_HeadAndRest(head, file), decoding.BLOCK_BYTES)
    lines = io.TextIOWrapper(buffer, encoding=encoding_of(head), newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        _check_column(header, column, where)
        at = header.index(column)
        for number, row in enumerate(reader, 2):
            if not row:
                continue
            if len(row) <= at:
                on_bad(
                    f"text file {where}, row {number}: it has {len(row)} columns of {len(header)}"
                )
            elif "\0" in row[at]:
                on_bad(f"text file {where}, row {number}: it holds a NUL")
            elif row[at]:
                yield row[at].replace("\r\n", "\n")
    except csv.Error as error:
        raise ValueError(f"text file {where}, line {reader.line_num}: {error}") from None
    except UnicodeDecodeError:
        line = reader.line_num + 1
        raise ValueError(f"text file {where} is not UTF-8 text (from line {line} on)") from None


def _strings(array: Any, where: str, column: str, first: int, on_bad: OnBad) -> Iterator[str]:
    """The texts of an Arrow array, whose first row has the number ``first``; nulls left out."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
        array = array.cast(kind)
    if pa.types.is_null(kind):
        return
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    ):
        raise ValueError(
            f"text file {where}: its column {column!r} holds {kind}, not strings; "
            "--text-column names another"
        )
    for number, value in enumerate(array, first):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            on_bad(
                f"text file {where}, row {number}: not UTF-8 text (byte {error.start} of the text)"
            )
            continue
        if text is not None:
            yield text


def open_parquet(file: Any, uri: str) -> pq.ParquetFile:
    """Raises ValueError, naming ``uri``, if the file is no Parquet file."""
    try:
        # Read page by page, not a row group at once; page checksums are verified where present.
        return pq.ParquetFile(
            file, pre_buffer=False, buffer_size=1 << 20, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"text file {uri} is not a Parquet file: {reason}") from None


def parquet_documents(
    file: Any, groups: Sequence[int], where: str, column: str, on_bad: OnBad
) -> Iterator[str]:
    """The documents of the row groups ``groups``; none named is all."""
    parquet = open_parquet(file, where)
    _check_column(parquet.schema_arrow.names, column, where)
    sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    for group in groups or range(parquet.num_row_groups):
        at = 1 + sum(sizes[:group])
        for batch in parquet.iter_batches(batch_size=1024, row_groups=[group], columns=[column]):
            yield from _strings(batch.column(0), where, column, at, on_bad)
            at += len(batch)


def arrow_documents(data: bytes, where: str, column: str, on_bad: OnBad) -> Iterator[str]:
    """The documents of an Arrow IPC file or stream."""
    try:
        reader = pa.ipc.open_file(data)
        count = reader.num_record_batches
        batches = (reader.get_batch(i) for i in range(count))
    except pa.ArrowInvalid:
        try:
            reader = pa.ipc.open_stream(data)
        except pa.ArrowInvalid as error:
            raise ValueError(f"text file {where} is not an Arrow file: {error}") from None
        batches = iter(reader)
    _check_column(reader.schema.names, column, where)
    at = 1
    for batch in batches:
        batch.validate(full=True)  # its offsets are trusted by all that reads it
        yield from _strings(batch.column(column), where, column, at, on_bad)
        at += len(batch)
