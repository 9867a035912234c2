"""Blocks of a file at every boundary: joined they are the file, and lines are whole."""

from __future__ import annotations

import codecs
import io

import pytest

from nanochat_ray.data import decoding, plain_text
from nanochat_ray.data.decoding import decode, encoding_of, lines_of, read_blocks
from nanochat_ray.data.plain_text import block_spans, documents, line_start, read_block

TEXT = "ab\n\ncäd\n€xyz\n😀end and a longer line ä€😀 of it\nlast"
DATA = TEXT.encode()


def test_lines_begin_at_or_after_an_offset() -> None:
    starts = [0, *(i + 1 for i, byte in enumerate(DATA) if byte == ord("\n")), len(DATA)]
    for at in range(len(DATA) + 1):
        golden = min(start for start in starts if start >= at)
        assert line_start(io.BytesIO(DATA), at) == golden, at
    assert line_start(io.BytesIO(b"x" * 70_000 + b"\ny"), 5) == 70_001


@pytest.mark.parametrize("line_bytes", [1, 4, 5, 9, 1000])
def test_blocks_joined_are_the_text(line_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "LINE_BYTES", line_bytes)
    for size in range(5, len(DATA) + 2):
        monkeypatch.setattr(decoding, "BLOCK_BYTES", size)
        spans = block_spans((0, len(DATA)))
        assert spans[0][0] == 0
        assert [stop for _, stop in spans[:-1]] == [start for start, _ in spans[1:]]
        if line_bytes >= 5:  # a character of up to four bytes, and the byte before it
            blocks = [read_block(io.BytesIO(DATA), span, "x") for span in spans]
            assert "".join(blocks) == TEXT, size
        if line_bytes == 1000:  # lines are whole
            assert all(block.endswith("\n") for block in blocks[:-2] if block)


def test_a_mark_is_dropped_at_the_start_alone() -> None:
    data = "\ufeffab\n\ufeffcd".encode()
    assert read_block(io.BytesIO(data), (0, 6), "x") == "ab\n"
    assert read_block(io.BytesIO(data), (6, len(data)), "x") == "\ufeffcd"


def test_later_documents_keep_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_text, "WHOLE_BYTES", 0)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 6)
    parts = list(documents(io.BytesIO("\ufeffab\n\ufeffcd\n\ufeffe".encode()), "x"))
    assert parts[0] == "ab\n"
    assert "".join(parts) == "ab\n\ufeffcd\n\ufeffe"


@pytest.mark.parametrize("block_bytes", [4, 7, 30])
@pytest.mark.parametrize("whole_bytes", [0, 10, 1000])
def test_streams_become_documents(
    whole_bytes: int, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain_text, "WHOLE_BYTES", whole_bytes)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", block_bytes)
    parts = list(documents(io.BytesIO(DATA), "x"))
    assert "".join(parts) == TEXT
    assert (len(parts) == 1) == (whole_bytes == 1000)
    wide = TEXT.encode("utf-16")  # one document, since it has no line that can be found
    assert list(documents(io.BytesIO(wide), "x")) == [TEXT]
    with pytest.raises(ValueError, match="text file x is empty"):
        list(documents(io.BytesIO(b" \n"), "x"))


@pytest.mark.parametrize("data", [b"a\nbc\n\nd", b"a\n", b"", b"\n\n", b"abc", b"a\r\nb"])
def test_lines_do_not_depend_on_blocks(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    golden = data.split(b"\n")
    if not golden[-1]:
        golden = golden[:-1]
    for size in range(1, 9):
        monkeypatch.setattr(decoding, "BLOCK_BYTES", size)
        assert list(lines_of(read_blocks(io.BytesIO(data)))) == golden


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (b"", "utf-8-sig"),
    ],
)
def test_encodings_by_their_mark(mark: bytes, encoding: str) -> None:
    assert encoding_of(mark + b"a\0\0\0") == encoding
    kind = {codecs.BOM_UTF16_BE: "utf-16-be", codecs.BOM_UTF32_BE: "utf-32-be"}.get(mark)
    kind = kind or {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(encoding, "utf-8")
    assert decode(mark + "ä\r\nb\n".encode(kind), "x") == "ä\nb\n"


def test_damage_is_named_by_its_byte() -> None:
    with pytest.raises(ValueError, match=r"file x is binary: it holds a NUL \(byte 102\)"):
        decode(b"ab\0", "x", 100)
    with pytest.raises(ValueError, match=r"file x is not UTF-8 text \(byte 101\)"):
        decode(b"a\xff", "x", 100)
