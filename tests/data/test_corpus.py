"""Where text comes from, and what is refused on the way."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.data import corpus, documentation, sources
from nanochat_ray.data.holdout import cut


def texts(*uris: str) -> list[str]:
    found = [text for unit in sources.units(sources.find(uris)) for text in corpus.read(unit)]
    return sorted(found)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "deep" / "b.md").write_text("# b")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"c text"))
    (tmp_path / "d.md.bz2").write_bytes(bz2.compress("d ä".encode()))
    (tmp_path / "e.jsonl").write_text(
        json.dumps({"text": "e1"}) + "\n\n" + json.dumps({"text": "e2"})
    )
    table = pa.table({"text": ["t1", None, "t2"], "n": [1, 2, 3]})
    pq.write_table(table, tmp_path / "f.parquet")
    with (
        pa.OSFile(str(tmp_path / "g.arrow"), "wb") as file,
        pa.ipc.new_file(file, table.schema) as w,
    ):
        w.write_table(table)
    with (
        pa.OSFile(str(tmp_path / "h.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as w,
    ):
        w.write_table(table)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_every_format(folder: Path) -> None:
    everything = ["# b", "a text", "c text", "d ä", "e1", "e2", *["t1", "t2"] * 3]
    assert texts(str(folder)) == sorted(everything)
    assert texts(f"file://{folder}") == sorted(everything)
    assert texts(f"{folder}/*.txt", f"{folder}/deep", f"{folder}/a.txt") == ["# b", "a text"]
    assert texts(f"{folder}/*.txt*") == ["a text", "c text"]


def test_on_s3(s3: str, folder: Path) -> None:
    from nanochat_ray.storage import Store

    store = Store.at(s3).child("text")
    for name in ("a.txt", "c.txt.gz", "f.parquet"):
        store.write_bytes(name, (folder / name).read_bytes())
    assert texts(store.uri) == ["a text", "c text", "t1", "t2"]
    assert texts(store.child("c.txt.gz").uri) == ["c text"]


def test_globs_are_those_of_a_shell(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b[1].txt", "in/a1.txt", "in/deep/a3.txt", "a1.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    for pattern, found in {
        "a?.txt": ["a1.txt", "a2.txt"],
        "a[!2].*": ["a1.md", "a1.txt"],
        "*/a*": ["in/a1.txt"],
        "**/a*.txt": ["a1.txt", "a2.txt", "in/a1.txt", "in/deep/a3.txt"],
        "b[1].txt": ["b[1].txt"],  # a file of that very name
    }.items():
        assert texts(f"{tmp_path}/{pattern}") == found


@pytest.mark.parametrize("name", ["big.txt", "big.jsonl"])
def test_a_large_file_is_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 700)
    # Characters of several bytes, empty lines, one line longer than a part, no newline at the end.
    said = [f"{i} " + "ä\u2028" * (i % 40) + "x" * (2000 if i == 70 else 0) for i in range(150)]
    lines = [json.dumps({"text": t}, ensure_ascii=False) if "jsonl" in name else t for t in said]
    (tmp_path / name).write_text("\n".join(lines))
    found = sources.find([str(tmp_path)])
    plan = sources.units(found)
    assert len(plan) > 10
    read = [text for unit in plan for text in corpus.read(unit)]
    assert read == said if "jsonl" in name else "".join(read) == "\n".join(said)


def test_large_parquet_files_are_read_by_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    said = [f"{i * 7919} is a number" for i in range(2000)]
    pq.write_table(pa.table({"text": said}), tmp_path / "x.parquet", row_group_size=100)
    plan = sources.units(sources.find([str(tmp_path)]))
    assert len(plan) > 5
    assert [text for unit in plan for text in corpus.read(unit)] == said


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("x.txt", b"", r"x\.txt is empty"),
        ("x.txt", b" \n", r"x\.txt is empty"),
        ("x.txt", b"ab\0cd", r"x\.txt is binary: it holds a NUL \(byte 2\)"),
        ("x.txt", b"ab\xff\xfe", r"x\.txt is not UTF-8 text \(byte 2\)"),
        ("x.pdf", b"%PDF", r"x\.pdf has a format that is not known: give \.txt, \.md"),
        ("x.jsonl", b'{"text": "a"}\n{"t": 1}', r"x\.jsonl, line 2: not a JSON object"),
        ("x.jsonl", b'{"text": 7}', r"x\.jsonl, line 1: not a JSON object"),
        ("x.arrow", b"rubbish", r"x\.arrow is not an Arrow file"),
        ("x.parquet", b"rubbish of some length", r"x\.parquet is not a Parquet file"),
        ("x.txt.gz", b"rubbish of some length", r"x\.txt\.gz cannot be read"),
        ("x.md.zst", b"rubbish of some length", r"x\.md\.zst cannot be read"),
    ],
)
def test_what_is_no_text_is_refused_by_name(
    tmp_path: Path, name: str, data: bytes, error: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=error):
        texts(str(tmp_path / name))


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' does not exist"):
        texts(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="names no file of a known format"):
        texts(str(tmp_path))
    with pytest.raises(ValueError, match="names no file of a known format"):
        texts(f"{tmp_path}/*.txt")
    with pytest.raises(ValueError, match=r"text='ftp://x' is not allowed"):
        texts("ftp://x")
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet has no column 'text', only \['body'\]"):
        texts(str(tmp_path))


def test_long_documents_are_cut_at_blank_lines() -> None:
    text = "".join(f"paragraph {i} " + "x" * (i % 70) + "\n\n" for i in range(300))
    pieces = cut(text, 1000)
    assert "".join(pieces) == text
    assert all(len(piece) <= 1000 for piece in pieces)
    assert all(piece.endswith("\n\n") for piece in pieces)
    assert cut("y" * 2500, 1000) == ["y" * 1000, "y" * 1000, "y" * 500]


def test_documentation_of_a_module(tmp_path: Path) -> None:
    doc = "This function does a thing that takes forty characters to tell."
    (tmp_path / "m.py").write_text(
        f'"""Module that has a docstring of more than forty characters."""\n'
        f'class A:\n    """{doc} (A)"""\n    def f(self):\n        """{doc}"""\n'
        f'def g():\n    """{doc}"""\ndef h():\n    """Short."""\n'
    )
    found = documentation.docstrings(tmp_path / "m.py")
    assert [text.splitlines()[0] for text in found[1:]] == ["class A:", "def f(self):", "def g():"]
    (document,) = documentation.documents([found])
    assert document.count(doc) == 2  # once in A's, once in f's; g's is f's again
    (tmp_path / "bad.py").write_text('"""x"""\ndef (')
    assert documentation.docstrings(tmp_path / "bad.py") == []


def test_the_default_corpus_is_of_the_needed_packages() -> None:
    names = dict(documentation.packages())
    assert {"torch", "ray", "numpy", "pyarrow"} <= set(names)
    assert not {"pytest", "openai", "transformers"} & set(names)
    files = documentation.files()
    assert len(files) == len(set(files)) > 3000
    assert documentation.key() == documentation.key()
