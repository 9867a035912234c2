"""Where text comes from, and what is refused on the way."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.data import corpus, decoding, documentation, plain_text, sources
from nanochat_ray.data.sources import ReadOptions, Unreadable
from nanochat_ray.data.split import split_document
from nanochat_ray.storage import Store, join_uri, split_uri


def texts(*uris: str) -> list[str]:
    documents = [text for unit in sources.units(sources.find(uris)) for text in corpus.read(unit)]
    return sorted(documents)


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
    store = Store.at(s3).child("text")
    for name in ("a.txt", "c.txt.gz", "f.parquet"):
        store.write_bytes(name, (folder / name).read_bytes())
    assert texts(store.uri) == ["a text", "c text", "t1", "t2"]
    assert texts(store.child("c.txt.gz").uri) == ["c text"]


def test_globs_are_those_of_a_shell(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b[1].txt", "in/a1.txt", "in/deep/a3.txt", "a1.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    for pattern, matches in {
        "a?.txt": ["a1.txt", "a2.txt"],
        "a[!2].*": ["a1.md", "a1.txt"],
        "*/a*": ["in/a1.txt"],
        "**/a*.txt": ["a1.txt", "a2.txt", "in/a1.txt", "in/deep/a3.txt"],
        "b[1].txt": ["b[1].txt"],  # a file of that very name
    }.items():
        assert texts(f"{tmp_path}/{pattern}") == matches


@pytest.mark.parametrize("name", ["big.txt", "big.jsonl"])
def test_a_large_file_is_read_in_spans(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 700)
    # Characters of several bytes, empty lines, one line longer than a part, no newline at the end.
    content = [f"{i} " + "ä\u2028" * (i % 40) + "x" * (2000 if i == 70 else 0) for i in range(150)]
    lines = [json.dumps({"text": t}, ensure_ascii=False) if "jsonl" in name else t for t in content]
    (tmp_path / name).write_text("\n".join(lines))
    files = sources.find([str(tmp_path)])
    plan = sources.units(files)
    assert len(plan) > 10
    read = [text for unit in plan for text in corpus.read(unit)]
    assert read == content if "jsonl" in name else "".join(read) == "\n".join(content)


def test_large_parquet_files_are_read_by_row_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 2000)
    content = [f"{i * 7919} is a number" for i in range(2000)]
    pq.write_table(pa.table({"text": content}), tmp_path / "x.parquet", row_group_size=100)
    plan = sources.units(sources.find([str(tmp_path)]))
    assert len(plan) > 5
    assert [text for unit in plan for text in corpus.read(unit)] == content


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("x.txt", b"", r"x\.txt is empty"),
        ("x.txt", b" \n", r"x\.txt is empty"),
        ("x.txt", b"ab\0cd", r"x\.txt is binary: it holds a NUL \(byte 2\)"),
        ("x.txt", b"ab\xff\xfe", r"x\.txt is not UTF-8 text \(byte 2\)"),
        ("x.pdf", b"%PDF", r"x\.pdf has an unknown format: give \.txt, \.md"),
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


DEEP = b"[" * 100_000
ONE = [{"text": "a"}, {"text": None}, {"text": "b"}]


def as_parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "data", "documents"),
    [
        ("x.json", json.dumps(ONE).encode(), ["a", "b"]),
        ("x.json", b'{"text": "a\\nb"}', ["a\nb"]),
        ("x.json", b'["a", "b"]', ["a", "b"]),
        ("x.json", b'{"text": "a"}\n{"text": null}\n{"text": "b"}\n', ["a", "b"]),
        ("x.ndjson", b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": null}\r\n', ["a"]),
        ("x.jsonl", '{"text": "ä"}\n{"text": "b"}'.encode("utf-16"), ["b", "ä"]),
        ("x.csv", b'id,text\r\n1,"a, ""q""\nb"\r\n2,\r\n\r\n3,c\r\n', ['a, "q"\nb', "c"]),
        ("x.csv", b"\xef\xbb\xbftext\n" + b"a" * 300_000 + b"\n", ["a" * 300_000]),
        ("x.tsv", b"text\tn\na,b\t1\n", ["a,b"]),
        ("x.txt.xz", lzma.compress(b"a"), ["a"]),
        ("x.jsonl.xz", lzma.compress(b'{"text": "a"}'), ["a"]),
        ("x.csv.gz", gzip.compress(b"text\na\n"), ["a"]),
        ("x.txt.gz", gzip.compress(b"a\n") + gzip.compress(b"b"), ["a\nb"]),
        ("x.parquet.bz2", bz2.compress(as_parquet(pa.table({"text": ["a"]}))), ["a"]),
        ("x.PY", b"def f():\r\n    pass\r\n", ["def f():\n    pass\n"]),
        ("x.txt", b"\xef\xbb\xbfa", ["a"]),
        ("x.txt", "äb".encode("utf-16"), ["äb"]),
        ("x.md", "äb".encode("utf-32"), ["äb"]),
        ("x.txt", b"a" * 3_000_000, ["a" * 3_000_000]),
        (
            "x.html",
            b"<html><head><title>t</title><style>s{}</style></head><body><h1>One &amp; two</h1>"
            b"<script>alert(1)</script><p>A <b>bold</b>\n word.<p>Next<br>line<pre>x\n  y</pre>"
            b"<ul><li>i<li>j</ul><table><tr><td>c</td></tr></table></div></body></html>",
            ["One & two\n\nA bold word.\n\nNext\nline\n\nx\n  y\n\ni\nj\n\nc\n"],
        ),
        ("x.htm", b'<meta charset="latin-1"><p>\xe4</p>', ["ä\n"]),
        (
            "x.parquet",
            as_parquet(pa.table({"text": pa.array(["a", None]).dictionary_encode()})),
            ["a"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats(tmp_path: Path, name: str, data: bytes, documents: list[str]) -> None:
    (tmp_path / name).write_bytes(data)
    assert texts(str(tmp_path)) == documents


def invalid_utf8() -> pa.Table:
    values = pa.array([b"fine", b"\xff\xfe", b"too"]).cast(pa.binary())
    column = pa.StringArray.from_buffers(3, *values.buffers()[1:])
    return pa.table({"text": column})


def flipped_page() -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"text": [f"number {i}" for i in range(5000)]})
    pq.write_table(table, sink, write_page_checksum=True, use_dictionary=False)
    data = bytearray(sink.getvalue().to_pybytes())
    data[len(data) // 3] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "data", "error", "rest"),
    [
        (
            "x.jsonl",
            b'{"text": "a"}\n' + DEEP + b'\n{"text": "b"}',
            "line 2: .*too deep",
            ["a", "b"],
        ),
        ("x.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: not UTF-8", ["a"]),
        ("x.jsonl", b'{"text": "a"}\n{"text": ["b"]}', "line 2: .*'text', which is", ["a"]),
        ("x.json", DEEP, "nested too deep", []),
        ("x.json", b'[{"text": "a"}, {"b": 1}]', r"item 2: .* only \['b'\]; --text-column", ["a"]),
        ("x.json", b'[{"text": "a"}', "is not JSON", []),
        ("x.csv", b'text\na\n"b', "line 3: unexpected end of data", ["a"]),
        ("x.csv", b"n\n1\n", r"no column 'text', only \['n'\]; --text-column", []),
        ("x.csv", b"n,text\n1\n2,b\n", "row 2: it has 1 columns of 2", ["b"]),
        ("x.csv", b"text\n\xe4\n", "not UTF-8 text", []),
        ("x.txt", "ä".encode("latin-1"), r"not UTF-8 text \(byte 0\); convert it", []),
        ("x.txt.xz", lzma.compress(b"abc" * 99)[:-30], "cannot be read", []),
        ("x.txt.gz", gzip.compress(b"abc" * 99)[:-12], "cannot be read", []),
        ("x.html", b"<p> </p>", "no text in its HTML", []),
        ("x.parquet", as_parquet(invalid_utf8()), "row 2: not UTF-8 text", ["fine", "too"]),
        ("x.parquet", flipped_page(), "cannot be read: ", []),
        (
            "x.parquet",
            as_parquet(pa.table({"text": [1]})),
            "holds int64, not strings; --text-col",
            [],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_named_or_skipped(
    tmp_path: Path, name: str, data: bytes, error: str, rest: list[str]
) -> None:
    (tmp_path / "ok.txt").write_text("ok")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=error) as failure:
        texts(str(tmp_path))
    assert name in str(failure.value)
    assert "\n" not in str(failure.value)
    options, unreadable = ReadOptions(skip_bad=True), Unreadable()
    plan = sources.units(sources.find([str(tmp_path)], options, unreadable), skip_bad=True)
    read = [text for unit in plan for text in corpus.read(unit, options, unreadable)]
    assert read == ["ok", *rest]
    assert unreadable.count == len(unreadable.first) == 1
    assert name in unreadable.first[0]


def test_the_text_column_has_any_name(tmp_path: Path) -> None:
    table = pa.table({"body": ["p"], "text": [1]})
    (tmp_path / "a.parquet").write_bytes(as_parquet(table))
    (tmp_path / "b.jsonl").write_text('{"body": "j"}')
    (tmp_path / "c.csv").write_text("x,body\n1,c\n")
    options = ReadOptions(text_column="body")
    plan = sources.units(sources.find([str(tmp_path)], options))
    assert [text for unit in plan for text in corpus.read(unit, options)] == ["p", "j", "c"]


def test_links_bring_each_file_once(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "b.txt").write_text("b")
    (tmp_path / "beside.txt").write_text("beside")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "c.txt").write_text("c")
    links = {
        "loop": ".",
        "deep/up": "..",
        "deep/er/up": "..",
        "out": "../other",
        "deep/z": "../deep",
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "above").symlink_to("..")
    (folder / "again.txt").symlink_to("a.txt")
    assert texts(str(folder)) == ["a", "b", "c"]
    assert texts(f"{folder}/**/*.txt", str(folder), f"{folder}/again.txt") == ["a", "b", "c"]


@pytest.mark.parametrize("kind", ["FIFO", "device", "socket", "link", "loop", "folder"])
def test_special_files_are_refused_and_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    (tmp_path / "ok.txt").write_text("ok")
    path = tmp_path / "x.txt"
    error = {"link": "No such file", "loop": "symbolic links"}.get(kind, f"is a {kind}")
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        monkeypatch.chdir(tmp_path)  # the path of a socket may not be long
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("x.txt")
    elif kind == "folder":
        path.mkdir()
        assert texts(str(tmp_path)) == ["ok"]
        return
    else:
        path.symlink_to("x.txt" if kind == "loop" else "nowhere")
    for uri in (str(tmp_path), f"{tmp_path}/*.txt"):
        with pytest.raises(ValueError, match=error):
            texts(uri)
    unreadable = Unreadable()
    files = sources.find([str(tmp_path)], ReadOptions(skip_bad=True), unreadable)
    assert [source.uri for source in files] == [str(tmp_path / "ok.txt")]
    assert unreadable.count == 1
    # One that has become a FIFO since it was listed.
    source = sources.Source(uri=str(path), size=1, mtime_ns=0)
    with pytest.raises(ValueError, match=r"x\.txt"):
        list(corpus.read((source,)))


def test_empty_source_files_are_nothing_wrong(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").touch()
    (tmp_path / "a.py").write_text("a = 1\n")
    assert texts(str(tmp_path)) == ["a = 1\n"]


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_files_may_have_any_name(
    request: pytest.FixtureRequest, tmp_path: Path, where: str
) -> None:
    root = str(tmp_path / "t")
    if where == "s3":
        root = Store.at(request.getfixturevalue("s3")).child(f"names-{tmp_path.name}"[:40]).uri
    store = Store.at(root)
    scheme, path, options = split_uri(root)

    def below(name: str) -> str:
        return join_uri(scheme, f"{path}/{name}", options)

    names = ["a b", "grüße", "a#b", "a?b", "a%b", "a%20b", "a[1]", "a&b=c", "what?x=1", "日本"]
    for name in names:
        store.write_text(f"{name}/{name}.txt", name)
    assert texts(store.uri) == sorted(names)
    assert texts(below("*/*.txt")) == sorted(names)
    for name in names:
        assert texts(below(name)) == [name]
        assert texts(below(f"{name}/{name}.txt")) == [name]


def test_long_lines_split_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 1000)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 300)
    monkeypatch.setattr(plain_text, "LINE_BYTES", 50)
    content = "ä€😀x" * 900
    (tmp_path / "x.txt").write_text(content)
    plan = sources.units(sources.find([str(tmp_path)]))
    read = [text for unit in plan for text in corpus.read(unit)]
    assert "".join(read) == content
    assert max(map(len, read)) <= 300


def test_long_compressed_text_is_read_in_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 300)
    monkeypatch.setattr(plain_text, "WHOLE_BYTES", 1000)
    lines = "".join(f"{i} " + "ä€😀" * (i % 30) + "\n" for i in range(200))
    for content in (lines, "ä€😀x" * 900):
        for name, data in {
            "x.txt.gz": gzip.compress(content.encode()),
            "x.txt.xz": lzma.compress(content.encode()),
        }.items():
            (tmp_path / name).write_bytes(data)
            read = list(corpus.read(tuple(sources.find([str(tmp_path / name)]))))
            assert "".join(read) == content
            assert len(read) > 10


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
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
    pieces = split_document(text, 1000)
    assert "".join(pieces) == text
    assert all(len(piece) <= 1000 for piece in pieces)
    assert all(piece.endswith("\n\n") for piece in pieces)
    assert split_document("y" * 2500, 1000) == ["y" * 1000, "y" * 1000, "y" * 500]


def test_documentation_of_a_module(tmp_path: Path) -> None:
    doc = "This function does a thing that takes forty characters to tell."
    (tmp_path / "m.py").write_text(
        f'"""Module that has a docstring of more than forty characters."""\n'
        f'class A:\n    """{doc} (A)"""\n    def f(self):\n        """{doc}"""\n'
        f'def g():\n    """{doc}"""\ndef h():\n    """Short."""\n'
    )
    docstrings = documentation.docstrings(tmp_path / "m.py")
    assert [text.splitlines()[0] for text in docstrings[1:]] == [
        "class A:",
        "def f(self):",
        "def g():",
    ]
    (document,) = documentation.documents([docstrings])
    assert document.count(doc) == 2  # once in A's, once in f's; g's is f's again
    (tmp_path / "bad.py").write_text('"""x"""\ndef (')
    assert documentation.docstrings(tmp_path / "bad.py") == []


@pytest.mark.slow
def test_the_default_corpus_is_of_the_needed_packages() -> None:
    names = dict(documentation.packages())
    assert {"torch", "ray", "numpy", "pyarrow"} <= set(names)
    assert not {"pytest", "openai", "transformers"} & set(names)
    files = documentation.files()
    assert len(files) == len(set(files)) > 3000
    assert documentation.key() == documentation.key()
