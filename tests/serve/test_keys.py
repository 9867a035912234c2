"""API keys: what a deployment carries of them, and what guards an endpoint."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat_ray.serve import keys


def test_a_hash_holds_no_key_and_knows_it() -> None:
    one, again = keys.hash_key("secret-1"), keys.hash_key("secret-1")
    assert "secret" not in one + again
    assert one != again  # salted
    assert keys.hash_key(one) == one
    ring = keys.KeyRing([one, keys.hash_key("secret-2"), "plain ä"])
    names = [ring.name_of(key.encode()) for key in ("secret-1", "secret-2", "plain ä")]
    assert None not in names
    assert len(set(names)) == 3
    for wrong in (b"", b"secret", b"secret-3", one.encode(), b"\xff"):
        assert ring.name_of(wrong) is None
    assert keys.KeyRing([one]).name_of(b"secret-1") == names[0]  # whatever else there is
    assert not keys.KeyRing([])


KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    "other",
    [KEY[:-1], KEY[:8], KEY[1:], KEY + "0", KEY.upper(), f" {KEY}", f"{KEY}\n", KEY[::-1], "0", ""],
)
def test_only_the_whole_key_is_accepted(other: str) -> None:
    ring = keys.KeyRing([keys.hash_key("another"), keys.hash_key(KEY)])
    assert ring.name_of(KEY.encode())
    assert ring.name_of(other.encode()) is None


@pytest.mark.parametrize("at", [0, 7, 8, 31, 32, 63])
def test_the_whole_digest_counts(at: int) -> None:
    prefix, salt, digest = keys.hash_key(KEY).split(":")
    other = f"{(int(digest[at], 16) + 1) % 16:x}"
    ring = keys.KeyRing([f"{prefix}:{salt}:{digest[:at]}{other}{digest[at + 1 :]}"])
    assert ring.name_of(KEY.encode()) is None


def test_recorded_hash_and_name() -> None:
    """sha256 of the salt's text followed by the key; the name is its first 16 digits."""
    salt = "00112233445566778899aabbccddeeff"
    digest = hashlib.sha256((salt + KEY).encode()).hexdigest()
    assert digest == "61879010f5457f4a82da1cf1cd4d8031ff9259694053d92da072a3c86a05974e"
    ring = keys.KeyRing([f"sha256:{salt}:{digest}"])
    assert ring.name_of(KEY.encode()) == f"key {digest[:16]}"
    assert len(keys.hash_key(KEY)) == 7 + 32 + 1 + 64


def test_a_wrong_hash_is_refused_without_its_value() -> None:
    for wrong in ("my-real-key", "sha256:ab:cd", 7):
        with pytest.raises(ValueError, match=r"key_hashes\[1\]") as caught:
            keys.check_hashes("key_hashes", [keys.hash_key("x"), wrong])
        assert "my-real-key" not in str(caught.value)


def test_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"one, two\n\n{keys.hash_key('three')}\n")
    ring = keys.KeyRing(keys.from_file(str(file)))
    assert all(ring.name_of(key) for key in (b"one", b"two", b"three"))
    file.write_text(" \n,")
    for path in (file, tmp_path / "none", tmp_path):
        with pytest.raises(ValueError, match="key_file="):
            keys.from_file(str(path))


def test_the_command_prints_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(keys.VARIABLE, "one, two,")
    process = subprocess.run(
        [sys.executable, "-m", "nanochat_ray.serve.keys"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    head, *lines = process.stdout.splitlines()
    assert head == "key_hashes:"
    ring = keys.KeyRing([line.removeprefix("  - ") for line in lines])
    assert ring.name_of(b"one")
    assert ring.name_of(b"two")
