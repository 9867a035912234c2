"""A run or a dataset has one writer at a time; a writer that is gone loses its claim."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qsl

import psutil
import pytest

from nanochat_ray import claim
from nanochat_ray.claim import ClaimLostError, Owner, acquire, hold_claim
from nanochat_ray.storage import Store, split_uri
from tests.s3_server import S3_KEYS
from tests.waiting import wait_for


def test_second_writer_is_refused_by_name(root: Store) -> None:
    with (
        hold_claim(root, "runs", "base"),
        pytest.raises(ValueError, match=r"runs/base of .* is in use: process \d+ on "),
    ):
        acquire(root, "runs", "base")
    acquire(root, "runs", "base").release()  # given back


def test_names_and_kinds_do_not_disturb_each_other(root: Store) -> None:
    with (
        hold_claim(root, "runs", "a"),
        hold_claim(root, "runs", "b"),
        hold_claim(root, "datasets", "a"),
    ):
        pass


def test_one_of_many_gets_the_claim(root: Store) -> None:
    outcomes: list[str] = []
    barrier = threading.Barrier(8)

    def work() -> None:
        barrier.wait()
        try:
            acquire(root, "runs", "base")
            outcomes.append("acquired")
        except ValueError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("acquired") == 1
    assert len(outcomes) == 8


def test_dead_owner_loses_its_claim_at_once(root: Store) -> None:
    program = (
        "import os, sys; from nanochat_ray.claim import acquire; "
        "from nanochat_ray.storage import Store; "
        "acquire(Store.at(sys.argv[1]), 'runs', 'base'); os._exit(9)"
    )
    result = subprocess.run([sys.executable, "-c", program, root.uri], check=False)
    assert result.returncode == 9
    acquire(root, "runs", "base").release()


def test_hidden_owner_is_not_taken_for_dead(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """With hidepid, /proc lacks the processes of other users: only renewals show their life."""

    def hide(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    first = acquire(root, "runs", "base")
    assert first.owner.is_alive()
    monkeypatch.setattr(claim.psutil, "Process", hide)
    assert first.owner.is_alive() is False
    monkeypatch.setattr(claim.os, "kill", refuse)
    assert first.owner.is_alive() is None
    first.release()


def test_owner_that_was_taken_over_may_not_publish(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = acquire(root, "runs", "base")
    mine.check()
    monkeypatch.setattr(Owner, "is_alive", lambda self: False)
    other = acquire(root, "runs", "base")
    with pytest.raises(ClaimLostError, match="another job has taken over runs/base"):
        mine.check()
    other.check()
    mine.release()  # leaves the other's alone
    other.check()
    other.release()


def test_silent_owner_of_another_machine_is_waited_for(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "LEASE", 0.3)
    first = acquire(root, "runs", "base")
    first._over.set()  # it does not renew any more
    first._thread.join()
    away = replace(first.owner, machine="another", host="another")
    first._write(away)
    acquire(root, "runs", "base").release()


def test_living_owner_of_another_machine_is_respected(
    root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "LEASE", 100.0)
    monkeypatch.setattr(claim, "RENEW_EVERY", 0.05)
    owner = replace(Owner.here("abc"), machine="another", host="another")
    folder = root.child("claims", "runs", "base")
    folder.create("00000001.json", owner.to_json().encode())

    def until_renewed(seconds: float) -> None:
        before = folder.read_bytes("00000001.json")
        wait_for(lambda: folder.read_bytes("00000001.json") != before, what="a renewal")

    # Of this module alone: time.sleep itself is used here.
    monkeypatch.setattr(claim, "time", SimpleNamespace(**{**vars(time), "sleep": until_renewed}))
    living = claim.Claim(folder, 1, owner, "runs/base")
    with pytest.raises(ValueError, match=r"in use: process .* on another"):
        acquire(root, "runs", "base")
    living.release()


def test_claims_of_earlier_versions_are_read(root: Store) -> None:
    folder = root.child("claims", "runs", "base")
    owner = Owner.here("abc")
    values = {"token": "abc", "host": owner.host, "machine": owner.machine, "pid": owner.pid}
    values |= {"started": owner.process_start, "renewed": owner.renewed_at, "released": False}
    folder.write_text("00000001.json", json.dumps(values))
    assert Owner.from_json(folder.read_bytes("00000001.json")) == owner
    assert json.loads(owner.to_json()) == values
    with pytest.raises(ValueError, match="is in use"):
        acquire(root, "runs", "base")
    folder.write_text("00000001.json", json.dumps(values | {"released": True}))
    acquire(root, "runs", "base").release()


@pytest.mark.parametrize(
    "where", ["folder", "folder without hard links", "s3", "s3 by AWS_*", "s3 by ~/.aws"]
)
def test_only_one_creates_a_file(
    where: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "no hard links", source)

    if "without" in where:
        monkeypatch.setattr(os, "link", refuse)
    uri = request.getfixturevalue("s3") if "s3" in where else str(tmp_path / "a b?#%é")
    if "AWS" in where:
        address = dict(parse_qsl(split_uri(uri)[2]))["endpoint_override"]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        monkeypatch.setenv("AWS_REGION", "eu-central-1")
        uri = "s3://nanochat/by-environment"
    if "~" in where:
        (tmp_path / "keys").write_text(
            f"[one]\naws_access_key_id = {S3_KEYS['accessKey']}\n"
            f"aws_secret_access_key = {S3_KEYS['secretKey']}\n"
        )
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
        monkeypatch.setenv("AWS_PROFILE", "one")
        uri = Store.at(uri).child("by-file").uri
    store = Store.at(uri).child("claims-test")
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda i=i: results.append(store.create("x.json", b"%d" % i)))
        for i in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 5 + [True]
    content = store.read_bytes("x.json")
    assert not store.create("x.json", b"later")
    assert store.read_bytes("x.json") == content
    assert store.list() == ["x.json"]
    if "s3" not in where:
        with pytest.raises(FileExistsError):  # of its folder, which is a file
            store.create("x.json/y.json", b"")
