"""Documents of plain text: a whole file, or blocks of a large one that can be read separately."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from nanochat_ray.data import decoding
from nanochat_ray.data.decoding import decode, encoding_of, read_blocks

WHOLE_BYTES = 8 << 20
"""Plain text up to this size is one document, also when it is compressed."""
LINE_BYTES = 64 << 10
"""Distance within which a block ends at the end of a line; else it ends inside the line."""


def line_start(file: Any, at: int) -> int:
    """Offset of the first line that begins at ``at`` or later."""
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


def _block_start(file: Any, at: int) -> int:
    """As ``line_start``, but near ``at``: in a long line it is where a character begins."""
    if at == 0:
        return 0
    file.seek(at - 1)
    block = file.read(LINE_BYTES)
    end = block.find(b"\n")
    if end >= 0:
        return at + end
    # Bytes 10xxxxxx continue a character, up to 3 of them.
    tail = next((i for i, byte in enumerate(block[1:5]) if byte & 0xC0 != 0x80), 0)
    return min(at + tail, at - 1 + len(block))


def block_spans(span: tuple[int, int]) -> list[tuple[int, int]]:
    """The blocks of a span of a plain text, each of which is one document."""
    start, stop = span
    size = decoding.BLOCK_BYTES
    return [(at, min(at + size, stop)) for at in range(start, stop, size)]


def read_block(file: Any, span: tuple[int, int], where: str) -> str:
    """The document of one of ``block_spans``: the lines that begin in it."""
    first, last = _block_start(file, span[0]), _block_start(file, span[1])
    file.seek(first)
    # Only the start of a file names its encoding.
    return decode(file.read(max(0, last - first)), where, first, "" if first == 0 else "utf-8-sig")


def documents(file: Any, where: str) -> Iterator[str]:
    """One document, or several if the file turns out to be longer than ``WHOLE_BYTES``."""
    blocks = read_blocks(file)
    head, size = [], 0
    for block in blocks:
        head.append(block)
        size += len(block)
        if size > WHOLE_BYTES:
            break
    data = b"".join(head)
    encoding, start = encoding_of(data), 0
    if encoding == "utf-8-sig":
        for block in blocks:
            end = data.rfind(b"\n") + 1
            if not end:
                tail = next((i for i in range(1, 5) if data[-i] & 0xC0 != 0x80), 1)
                end = len(data) - tail
            yield decode(data[:end], where, start, encoding)
            start += end
            data = data[end:] + block
    else:
        data += b"".join(blocks)
    text = decode(data, where, start, encoding)
    if start == 0 and not text.strip():
        raise ValueError(f"text file {where} is empty")
    yield text
