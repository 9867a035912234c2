"""Bytes of a file to text: decompression, encodings and lines.

Text is UTF-8, or UTF-16 and UTF-32 with a byte order mark; line ends become ``\\n``. Anything else
(other encodings, NULs) raises ValueError that names the file and the byte.
"""

from __future__ import annotations

import codecs
import lzma
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

BLOCK_BYTES = 1 << 20
"""Bytes of one read, and the approximate size of a document of a large plain text."""
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
OnBad = Callable[[str], None]
"""Receives the message of each line, row or file that cannot be read; it may raise ValueError."""


def encoding_of(head: bytes) -> str:
    """The encoding that the byte order mark at the start of a file names; else UTF-8."""
    return next((name for mark, name in _BYTE_ORDER_MARKS if head.startswith(mark)), "utf-8-sig")


def decode(data: bytes, where: str, start: int = 0, encoding: str = "") -> str:
    """Text of ``data``, which begins at byte ``start`` of the file ``where``. Raises ValueError."""
    encoding = encoding or encoding_of(data)
    if encoding == "utf-8-sig":
        if (nul := data.find(b"\0")) >= 0:
            raise ValueError(f"text file {where} is binary: it holds a NUL (byte {start + nul})")
        # A byte order mark stands at the start of a file only; elsewhere it is a character.
        encoding = "utf-8" if start else encoding
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {where} is not UTF-8 text (byte {start + error.start}); "
            "convert it first, with iconv for example"
        ) from None
    return text.replace("\r\n", "\n") if "\r" in text else text


def replace_surrogates(text: str) -> str:
    """JSON can spell half a surrogate pair, which no encoder accepts: it becomes ``?``."""
    return text.encode("utf-8", "replace").decode()


class DecompressedFile:
    """Context manager: a file's decompressed bytes, in order; closes all that it opened."""

    def __init__(self, fs: pafs.FileSystem, path: str, compression: str | None):
        self._raw = fs.open_input_stream(path, compression=None)
        self._file: Any = self._raw
        if compression == "xz":
            self._file = lzma.LZMAFile(self._raw)  # noqa: SIM115 (closed with this)
        elif compression:
            self._file = pa.CompressedInputStream(self._raw, compression)

    def __enter__(self) -> Any:
        return self._file

    def __exit__(self, *_: object) -> None:
        self._raw.close()


def read_blocks(file: Any) -> Iterator[bytes]:
    """The rest of a file in blocks of ``BLOCK_BYTES``."""
    while block := file.read(BLOCK_BYTES):
        yield bytes(block)


def read_all(file: Any) -> bytes:
    return b"".join(read_blocks(file))


def lines_of(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Lines without their ends. Not splitlines, which also splits inside JSON strings."""
    rest: list[bytes] = []
    for block in blocks:
        first, *others = block.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    if any(rest):
        yield b"".join(rest)
