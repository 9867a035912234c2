"""Documents from files of text: plain, HTML, JSON, CSV, Parquet or Arrow, compressed or not.

``read`` is a plain function over one unit of work; Ray Data runs it in parallel. Files are read as
streams where their format allows it, so that memory holds about one document.

Text is UTF-8, or UTF-16 and UTF-32 with a byte order mark; line ends become ``\\n``. Anything else
(other encodings, NULs, damaged files) is refused by name, or left out and counted.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from nanochat_ray.data import markup
from nanochat_ray.data.formats import format_of
from nanochat_ray.data.sources import (
    DEFAULT,
    ReadOptions,
    Skipped,
    Source,
    Unit,
    check_regular,
    is_outside,
    open_filesystem,
    open_parquet,
)

BLOCK_BYTES = 1 << 20
"""Plain text above twice ``sources.UNIT_BYTES`` is read in documents of this size, about."""
WHOLE_BYTES = 8 << 20
"""Plain text up to this size is one document, though it is compressed."""
LINE_BYTES = 64 << 10
"""How far the end of a line is looked for where plain text is cut; else it is cut in the line."""
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
DAMAGE = (pa.ArrowException, lzma.LZMAError, zlib.error, EOFError, csv.Error, RecursionError)
OnBad = Callable[[str], None]


# --- bytes to text ------------------------------------------------------------------------------


def _encoding(beginning: bytes) -> str:
    return next((name for mark, name in _MARKS if beginning.startswith(mark)), "utf-8-sig")


def decode(data: bytes, where: str, start: int = 0, encoding: str = "") -> str:
    """Text of ``data``, which begins at byte ``start`` of its file."""
    encoding = encoding or _encoding(data)
    if encoding == "utf-8-sig" and (zero := data.find(b"\0")) >= 0:
        raise ValueError(f"text file {where} is binary: it holds a NUL (byte {start + zero})")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {where} is not UTF-8 text (byte {start + error.start}); "
            "convert it first, with iconv for example"
        ) from None
    return text.replace("\r\n", "\n") if "\r" in text else text


class Stream:
    """A file's bytes as a stream, decompressed; closes all that it opened."""

    def __init__(self, fs: pafs.FileSystem, path: str, compression: str | None):
        self._raw = fs.open_input_stream(path, compression=None)
        self.file: Any = self._raw
        if compression == "xz":
            self.file = lzma.LZMAFile(self._raw)  # noqa: SIM115 (closed with this)
        elif compression:
            self.file = pa.CompressedInputStream(self._raw, compression)

    def __enter__(self) -> Any:
        return self.file

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def _chunks(file: Any) -> Iterator[bytes]:
    while chunk := file.read(BLOCK_BYTES):
        yield bytes(chunk)


def _lines(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends. Not splitlines, which also cuts inside JSON strings."""
    rest: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    if any(rest):
        yield b"".join(rest)


# --- parts of large files -----------------------------------------------------------------------


def _line_start(file: Any, at: int) -> int:
    """Where the first line begins that does not begin before ``at``."""
    if at == 0:
        return 0
    at -= 1
    file.seek(at)
    while block := file.read(1 << 16):
        end = block.find(b"\n")
        if end >= 0:
            return at + end + 1
        at += len(block)
    return at


def _cut(file: Any, at: int) -> int:
    """As ``_line_start``, but near ``at``: in a long line it is where a character begins."""
    if at == 0:
        return 0
    file.seek(at - 1)
    block = file.read(LINE_BYTES)
    end = block.find(b"\n")
    if end >= 0:
        return at + end
    # Bytes 10xxxxxx continue a character, up to 3 of them.
    continued = next((i for i, byte in enumerate(block[1:5]) if byte & 0xC0 != 0x80), 0)
    return min(at + continued, at - 1 + len(block))


def blocks(span: tuple[int, int]) -> list[tuple[int, int]]:
    """The blocks of a part of a plain text, each read as one document."""
    start, stop = span
    return [(at, min(at + BLOCK_BYTES, stop)) for at in range(start, stop, BLOCK_BYTES)]


def _block(file: Any, block: tuple[int, int], where: str) -> str:
    first, last = _cut(file, block[0]), _cut(file, block[1])
    file.seek(first)
    # A mark stands at the start of a file alone; elsewhere it is a character.
    return decode(file.read(max(0, last - first)), where, first, "" if first == 0 else "utf-8-sig")


# --- formats ------------------------------------------------------------------------------------


def read_whole(stream: Any) -> bytes:
    return b"".join(_chunks(stream))


def _plain(stream: Any, where: str) -> Iterator[str]:
    """One document, or several where a stream turns out to be long."""
    chunks = _chunks(stream)
    held, size = [], 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if size > WHOLE_BYTES:
            break
    data = b"".join(held)
    encoding, start = _encoding(data), 0
    if encoding == "utf-8-sig":
        for chunk in chunks:
            end = data.rfind(b"\n", 0, max(BLOCK_BYTES, len(data))) + 1
            if not end:
                tail = next((i for i in range(1, 5) if data[-i] & 0xC0 != 0x80), 1)
                end = len(data) - tail
            yield decode(data[:end], where, start, encoding)
            start += end
            data = data[end:] + chunk
    else:
        data += b"".join(chunks)
    text = decode(data, where, start, encoding)
    if start == 0 and not text.strip():
        raise ValueError(f"text file {where} is empty")
    yield text


def _text_of(value: Any, column: str) -> str | None:
    """The document of a JSON value; None for null. ValueError says what the value is instead."""
    text = value
    if not isinstance(value, str):
        if not isinstance(value, dict) or column not in value:
            raise ValueError(f"not a JSON object with a text in {column!r}")
        text = value[column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"not a JSON object with a text in {column!r}, which is {text!r:.40}")
    # JSON can spell half a surrogate pair, which no encoder takes.
    return text.encode("utf-8", "replace").decode()


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _json_lines(lines: Iterator[bytes], where: str, column: str, bad: OnBad) -> Iterator[str]:
    encoding = "utf-8"
    for number, data in enumerate(lines, 1):
        line = f"text file {where}, line {number}"
        if number == 1:
            encoding = _encoding(data)
            if encoding != "utf-8-sig":
                rest = b"\n".join([data, *lines])
                lines_ = iter(rest.decode(encoding).encode().split(b"\n"))
                yield from _json_lines(lines_, where, column, bad)
                return
            data = data.removeprefix(codecs.BOM_UTF8)
        if not data.strip():
            continue
        try:
            text = _text_of(_parse(data.decode()), column)
        except UnicodeDecodeError as error:
            bad(f"{line}: not UTF-8 text (byte {error.start} of the line)")
        except ValueError as error:
            reason = str(error) if "JSON" in str(error) else f"not a JSON object: {error}"
            bad(f"{line}: {reason}")
        else:
            if text is not None:
                yield text


def _json(data: bytes, where: str, column: str, bad: OnBad) -> Iterator[str]:
    """A JSON file: an array of objects or texts, one object, or objects on lines."""
    text = decode(data, where)
    try:
        values = json.loads(text)
    except RecursionError:
        raise ValueError(
            f"text file {where} is not JSON that can be read: nested too deep"
        ) from None
    except ValueError as error:
        if "Extra data" in str(error):
            yield from _json_lines(iter(text.encode().split(b"\n")), where, column, bad)
            return
        raise ValueError(f"text file {where} is not JSON: {error}") from None
    if not isinstance(values, list):
        values = [values]
    for number, value in enumerate(values, 1):
        try:
            document = _text_of(value, column)
        except ValueError as error:
            bad(f"text file {where}, item {number}: {error}")
        else:
            if document is not None:
                yield document


def _table_of_text(
    stream: Any, delimiter: str, where: str, column: str, bad: OnBad
) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    beginning = stream.read(4)
    rest = io.BufferedReader(_Joined(beginning, stream), BLOCK_BYTES)
    lines = io.TextIOWrapper(rest, encoding=_encoding(beginning), newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        if column not in header:
            raise ValueError(
                f"text file {where} has no column {column!r}, only {repr(header)[:200]}; "
                "--text-column names another"
            )
        at = header.index(column)
        for number, row in enumerate(reader, 2):
            if not row:
                continue
            if len(row) <= at:
                bad(f"text file {where}, row {number}: it has {len(row)} columns of {len(header)}")
            elif "\0" in row[at]:
                bad(f"text file {where}, row {number}: it holds a NUL")
            elif row[at]:
                yield row[at].replace("\r\n", "\n")
    except csv.Error as error:
        raise ValueError(f"text file {where}, line {reader.line_num}: {error}") from None
    except UnicodeDecodeError:
        line = reader.line_num + 1
        raise ValueError(f"text file {where} is not UTF-8 text (from line {line} on)") from None


class _Joined(io.RawIOBase):
    """Bytes that were read ahead, then the stream that they came from."""

    def __init__(self, beginning: bytes, stream: Any):
        self._beginning, self._stream = beginning, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._beginning[: len(buffer)]
        self._beginning = self._beginning[len(data) :]
        if not data:
            data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _column(names: list[str], column: str, where: str) -> str:
    if column not in names:
        raise ValueError(
            f"text file {where} has no column {column!r}, only {repr(names)[:200]}; "
            "--text-column names another"
        )
    return column


def _strings(array: Any, where: str, column: str, first: int, bad: OnBad) -> Iterator[str]:
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
        raise ValueError(f"text file {where}: its column {column!r} holds {kind}, not strings")
    for number, value in enumerate(array, first):
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            bad(f"text file {where}, row {number}: not UTF-8 text (byte {error.start} of the text)")
            continue
        if text is not None:
            yield text


def _parquet(file: Any, source: Source, where: str, column: str, bad: OnBad) -> Iterator[str]:
    parquet = open_parquet(file, where)
    name = _column(parquet.schema_arrow.names, column, where)
    rows = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
    for group in source.groups or range(parquet.num_row_groups):
        at = 1 + sum(rows[:group])
        for batch in parquet.iter_batches(batch_size=1024, row_groups=[group], columns=[name]):
            yield from _strings(batch.column(0), where, column, at, bad)
            at += len(batch)


def _arrow(data: bytes, where: str, column: str, bad: OnBad) -> Iterator[str]:
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
    _column(reader.schema.names, column, where)
    at = 1
    for batch in batches:
        batch.validate(full=True)  # its offsets are trusted by all that reads it
        yield from _strings(batch.column(column), where, column, at, bad)
        at += len(batch)


# --- files --------------------------------------------------------------------------------------


def _documents(source: Source, column: str, bad: OnBad) -> Iterator[str]:
    fs, path = open_filesystem(source.uri)
    if isinstance(fs, pafs.LocalFileSystem):
        check_regular(path)
    kind, compression = format_of(source.uri)
    where = source.uri
    if source.span is not None:
        with fs.open_input_file(path) as file:
            if kind == "jsonl":
                where += f" (from byte {source.span[0]:,} on)"
                first, last = (_line_start(file, at) for at in source.span)
                file.seek(first)
                lines = iter(file.read(max(0, last - first)).split(b"\n"))
                yield from _json_lines(lines, where, column, bad)
                return
            for block in blocks(source.span):
                try:
                    yield _block(file, block, where)
                except ValueError as error:
                    bad(str(error))
        return
    if kind == "parquet" and not compression:
        with fs.open_input_file(path) as file:
            yield from _parquet(file, source, where, column, bad)
        return
    with Stream(fs, path, compression) as stream:
        if kind in ("text", "code"):
            yield from _plain(stream, where)
        elif kind == "jsonl":
            yield from _json_lines(_lines(_chunks(stream)), where, column, bad)
        elif kind in ("csv", "tsv"):
            yield from _table_of_text(stream, "," if kind == "csv" else "\t", where, column, bad)
        elif kind == "json":
            yield from _json(read_whole(stream), where, column, bad)
        elif kind == "html":
            text = markup.text_of(_html(read_whole(stream), where))
            if not text.strip():
                raise ValueError(f"text file {where} has no text in its HTML")
            yield text
        elif kind == "parquet":
            file = pa.BufferReader(read_whole(stream))
            yield from _parquet(file, source, where, column, bad)
        else:
            yield from _arrow(read_whole(stream), where, column, bad)


def _html(data: bytes, where: str) -> str:
    """A page may name its own encoding, in a ``meta`` near its start."""
    named = re.search(rb"""<meta[^>]+charset=["']?([\w-]+)""", data[:2048], re.IGNORECASE)
    if named is None or _encoding(data) != "utf-8-sig":
        return decode(data, where)
    try:
        codec = codecs.lookup(named[1].decode())
        return data.decode(codec.name)
    except (LookupError, ValueError):
        return decode(data, where)


def read(
    unit: Unit,
    options: ReadOptions = DEFAULT,
    skipped: Skipped | None = None,
) -> Iterator[str]:
    """The documents of a unit. Raises ValueError, naming the file, for what is not text.

    With ``skip_bad`` that is added to ``skipped`` instead: a line or row alone where the rest of
    its file can be read, else what is left of the file.
    """
    skipped = Skipped() if skipped is None else skipped

    def bad(message: str) -> None:
        if not options.skip_bad:
            raise ValueError(message)
        skipped.add(message)

    for source in unit:
        try:
            yield from _documents(source, options.text_column, bad)
        except Exception as error:
            known = isinstance(error, ValueError) and source.uri in str(error)
            damage = isinstance(error, (*DAMAGE, ValueError))
            if not damage and not is_outside(error, source.uri):
                raise
            reason = str(error).partition("\n")[0][:300] or type(error).__name__
            message = str(error) if known else f"text file {source.uri} cannot be read: {reason}"
            if not options.skip_bad:
                raise ValueError(message) from None
            skipped.add(message)
