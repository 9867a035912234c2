"""One set of promises, kept by a folder and by a real S3 server."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pickle
import stat
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanochat_ray import conditional
from nanochat_ray.checkpoint import folder
from nanochat_ray.storage import (
    Store,
    absolute,
    cache_root,
    default_root,
    join_uri,
    split_uri,
    user_folder,
)


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "folder":
        return Store.at(str(tmp_path / "deep" / "folder"))
    return Store.at(request.getfixturevalue("s3")).child(f"storage-{uuid.uuid4().hex}")


@pytest.mark.parametrize("name", ["a", "deep/er/a.txt", "a.gz", "with space"])
def test_what_is_written_is_read(store: Store, name: str) -> None:
    data = bytes(range(256)) * 40
    assert not store.exists(name)
    store.write_bytes(name, data)
    assert store.exists(name)
    assert store.size(name) == len(data)
    assert store.read_bytes(name) == data
    with store.open_input(name) as file:
        file.seek(300)
        assert file.read(5) == data[300:305]
    store.write_bytes(name, b"other")
    assert store.read_bytes(name) == b"other"
    assert pickle.loads(pickle.dumps(store)).read_bytes(name) == b"other"


def test_folders(store: Store) -> None:
    child = store.child("runs", "one")
    assert store.list() == store.list("runs") == child.list() == []
    child.write_text("b", "ä")
    child.write_text("a", "")
    store.write_text("runs/two/c", "")
    assert store.list("runs") == ["one", "two"]
    assert child.list() == store.list("runs/one") == ["a", "b"]
    assert Store.at(child.uri).read_text("b") == "ä"
    child.delete("a")
    child.delete("never was")
    assert child.list() == ["b"]
    store.delete("runs/one")
    assert store.list("runs") == ["two"]
    assert not child.exists("b")


def test_a_local_root_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to processes that have another working directory, and perhaps another home."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for uri, path in (
        ("rel", tmp_path / "rel"),
        ("./rel/x", tmp_path / "rel" / "x"),
        ("~/x", tmp_path / "home" / "x"),
        (f"file://{tmp_path}/x", tmp_path / "x"),
        (f"{tmp_path}/a?b", tmp_path / "a?b"),
        (f"{tmp_path}/a b#c%20", tmp_path / "a b#c%20"),
    ):
        store = Store.at(uri)
        assert store.uri == store.root == absolute(uri) == str(path)
        child = pickle.loads(pickle.dumps(store.child("runs", "one")))
        child.write_text("f", "text")
        assert (path / "runs" / "one" / "f").read_text() == "text"


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "a\0b",
        "file://x/y",
        "file://.",
        "ftp://x/y",
        "s3:///x",
        "s3://[x",
        "S4://b",
        "ab:c",
        "s3://b/x?foo=1",
    ],
)
def test_a_root_that_cannot_be_is_named(uri: str) -> None:
    with pytest.raises(ValueError, match="storage="):
        Store.at(uri)


def test_what_is_not_there_is_named(store: Store) -> None:
    for call in (store.read_bytes, store.size, store.open_input):
        with pytest.raises(FileNotFoundError, match="there is no file nowhere"):
            call("nowhere")


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path))
    store.write_text("a", "whole")

    def fail() -> None:
        with store.writing("a") as stream:
            stream.write(b"half")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        fail()
    assert store.read_text("a") == "whole"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Each sync, as (inode, size), and each name that a file or folder gets."""
    events: list[Any] = []

    def sync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        events.append((status.st_ino, 0 if stat.S_ISDIR(status.st_mode) else status.st_size))

    def note(call: Callable[[str, str], None], old: str, new: str) -> None:
        call(old, new)
        events.append(new)

    monkeypatch.setattr(os, "fsync", sync)
    for name in ("replace", "rename", "link"):
        monkeypatch.setattr(os, name, functools.partial(note, getattr(os, name)))
    return events


@pytest.mark.parametrize("write", [Store.write_bytes, Store.create])
def test_a_file_outlives_a_loss_of_power(
    tmp_path: Path, disk: list[Any], write: Callable[[Store, str, bytes], object]
) -> None:
    """Its data is on the disk before it has its name, and then the name."""
    target = tmp_path / "runs" / "a"
    write(Store.at(str(tmp_path)), "runs/a", b"12345")
    assert disk == [(target.stat().st_ino, 5), str(target), (target.parent.stat().st_ino, 0)]


def test_an_export_outlives_a_loss_of_power(tmp_path: Path, disk: list[Any]) -> None:
    target = tmp_path / "out"
    with folder.writing(Store.at(str(target))) as aside:
        (aside / "b").write_text("12")
        (aside / "a").write_text("1")
    files = [(target / name).stat() for name in ("a", "b", folder.MARKER)]
    before_the_name = [*((file.st_ino, file.st_size) for file in files), (target.stat().st_ino, 0)]
    assert disk == [*before_the_name, target, (tmp_path.stat().st_ino, 0)]


@pytest.mark.parametrize(("number", "is_error"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_folder_that_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, is_error: bool
) -> None:
    """Some file systems sync files alone; a disk that fails is an error."""

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(OSError, match="error") if is_error else contextlib.nullcontext():
        Store.at(str(tmp_path)).write_text("a", "x")


ODD = ["a?b", "a#b", "100%", "a%20b", "a b", "a[1]", "grüße-日本", "a&b=c", "a+b", "what?x=1"]


@pytest.mark.parametrize("name", ODD)
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    store = Store.at(str(tmp_path / name))
    child = store.child("runs", "one")
    child.write_text("a", "x")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "runs" / "one" / "a").read_text() == "x"
    for again in (Store.at(child.uri), pickle.loads(pickle.dumps(child)), Store.at(child.uri)):
        assert again.list() == ["a"]
    assert Store.at((tmp_path / name / "runs").as_uri()).list("one") == ["a"]


def test_keys_may_have_any_name(s3: str) -> None:
    root = Store.at(s3).child(f"odd-{uuid.uuid4().hex}")
    scheme, path, options = split_uri(root.uri)
    for name in ODD:
        child = Store.at(join_uri(scheme, f"{path}/{name}", options))
        child.write_text("a", name)
        assert Store.at(child.uri).read_text("a") == name
        assert pickle.loads(pickle.dumps(child)).list() == ["a"]
    assert root.list() == sorted(ODD)


@pytest.mark.parametrize(
    ("uri", "parts"),
    [
        ("s3://b/k", ("s3", "b/k", "")),
        ("s3://b/k?region=x&scheme=http", ("s3", "b/k", "region=x&scheme=http")),
        ("s3://b/what?.txt", ("s3", "b/what?.txt", "")),
        ("s3://b/what?.txt?region=x", ("s3", "b/what?.txt", "region=x")),
        ("s3://b/k?a=b?", ("s3", "b/k?a=b", "")),
        ("/a?b=c", ("", "/a?b=c", "")),
        ("ab:c", ("ab", "c", "")),
        ("/x/s3://y", ("", "/x/s3://y", "")),
        ("file:///a%20b?c", ("file", "/a b?c", "")),
        ("file:/a", ("file", "/a", "")),
        ("file://localhost/a", ("file", "/a", "")),
        ("hf://d/x?.txt", ("hf", "d/x?.txt", "")),
    ],
)
def test_uris_are_split(uri: str, parts: tuple[str, str, str]) -> None:
    assert split_uri(uri) == parts
    if parts[0] in ("s3", "gs"):
        assert split_uri(join_uri(*parts)) == parts


@pytest.mark.parametrize("uri", ["s3://", "s3:x@y/k", "s3://key:secret@b/k", "a\0b"])
def test_uris_that_are_none_are_refused(uri: str) -> None:
    with pytest.raises(ValueError, match="storage="):
        Store.at(uri)


def test_uris(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Store.at(str(tmp_path)).write_text("a", "x")
    monkeypatch.chdir(tmp_path)
    for uri in (f"file://{tmp_path}", ".", f"{tmp_path}/"):
        assert Store.at(uri).read_text("a") == "x"
    there = Store.at("s3://b/x?region=us-east-1&scheme=http").child("y")
    assert there.uri == "s3://b/x/y?region=us-east-1&scheme=http"
    assert there.path("z") == "b/x/y/z"


def test_the_region_is_that_of_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the bucket, as pyarrow knows it, whatever the environment says."""
    monkeypatch.setenv("AWS_REGION", "us-west-2")
    calls: list[Any] = []
    monkeypatch.setattr(conditional.obstore, "put", lambda store, *_, **__: calls.append(store))
    store = Store.at("s3://bucket/folder?region=eu-central-1&endpoint_override=127.0.0.1:1")
    assert store.create("name", b"")
    (bucket,) = calls
    assert bucket.config["region"] == "eu-central-1"
    assert bucket.config["endpoint"] == "https://127.0.0.1:1"


def test_the_default_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("NANOCHAT_STORAGE", "")
    assert default_root() == "/cache/nanochat_ray"
    monkeypatch.setenv("NANOCHAT_STORAGE", "s3://bucket/nanochat")
    assert default_root() == "s3://bucket/nanochat"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a number that no table of users has, and without HOME: flags still name folders."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("NANOCHAT_STORAGE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert default_root() == "~/.cache/nanochat_ray"
    with pytest.raises(ValueError, match="has no home folder: set HOME or XDG_CACHE_HOME"):
        cache_root()
    assert user_folder("XDG_STATE_HOME", ".local/state") == Path("/state")


def test_a_full_disk_names_the_file(root: Store) -> None:
    """A limit on file sizes fails within write(2), as a full disk does."""
    program = f"""
import resource, signal
from nanochat_ray.cli import entry
from nanochat_ray.storage import Store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
store = Store.at({root.uri!r})
for write in (store.write_bytes, store.create):
    try:
        write("runs/x/weights", bytes(5000))
    except OSError as error:
        print(entry.explain(error))
"""
    lines = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert lines == [f"{root.uri}/runs/x/weights: File too large"] * 2
    assert Store.at(root.uri).list("runs/x") == [] == list(Path(root.uri).rglob("*.tmp"))
