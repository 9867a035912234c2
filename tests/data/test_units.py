"""How files become units of work, and what is kept of those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_ray.data import sources
from nanochat_ray.data.sources import Source, Unreadable, units


def source(size: int, uri: str = "a.txt.gz") -> Source:
    return Source(uri=uri, size=size, mtime_ns=0)


def sizes(sources: list[Source], **options: bool) -> list[list[int]]:
    return [[part.size for part in unit] for unit in units(sources, **options)]


def test_small_files_share_a_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 100)
    files = [source(n) for n in (40, 60, 1, 99, 500, 20, 80, 7)]
    assert sizes(files) == [[40, 60], [1, 99], [500], [20, 80], [7]]
    assert units([]) == []


def test_large_text_is_divided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 100)
    text, twice, wide = (tmp_path / name for name in ("a.txt", "b.txt", "c.txt"))
    text.write_text("x" * 250)
    twice.write_text("x" * 200)
    wide.write_bytes("x".encode("utf-16") * 80)
    files = [source(40), source(250, str(text)), source(10), source(200, str(twice))]
    assert sizes(files) == [[40], [100], [100], [50, 10], [200]]
    parts = [part for unit in units(files[1:2]) for part in unit]
    assert [part.span for part in parts] == [(0, 100), (100, 200), (200, 250)]
    # Compressed text, and text of another width, can be read from its start only.
    assert sizes([source(320, str(wide)), source(999)]) == [[320], [999]]
    for mark in (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff"):
        wide.write_bytes(mark + b"x" * 318)
        assert sizes([source(320, str(wide))]) == [[320]]
    wide.write_bytes(b"\0\0x" + b"x" * 318)
    assert sizes([source(320, str(wide))]) == [[100], [100], [100], [20]]


def test_units_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most about a thousand of them, until a unit is 16 times as large."""
    monkeypatch.setattr(sources, "UNIT_BYTES", 1)
    assert sizes([source(3)] * 4096) == [[3] * 4] * 1024
    assert sizes([source(8)] * 3200) == [[8] * 2] * 1600


def test_a_file_that_vanishes_is_named_or_left_to_its_task(tmp_path: Path) -> None:
    missing = source(1 << 30, str(tmp_path / "none.txt"))
    with pytest.raises(ValueError, match=r"text file .*none\.txt cannot be read"):
        units([missing])
    assert units([missing], skip_bad=True) == [(missing,)]


def test_the_first_messages_are_kept() -> None:
    one, two = Unreadable(), Unreadable()
    for n in range(15):
        one.add(f"a{n}")
    for n in range(25):
        two.add(f"b{n}")
    assert (two.count, two.first) == (25, [f"b{n}" for n in range(20)])
    one.merge(two)
    assert (one.count, one.first) == (
        40,
        [f"a{n}" for n in range(15)] + [f"b{n}" for n in range(5)],
    )
