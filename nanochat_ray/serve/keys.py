"""API keys as a deployment carries them: salted hashes, of which nobody who reads it can call.

    NANOCHAT_API_KEYS=key1,key2 python -m nanochat_ray.serve.keys    # lines for cluster/serve.yaml

Keys are to be long and random (``openssl rand -hex 24``): a short one can be guessed from its hash.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

VARIABLE = "NANOCHAT_API_KEYS"
"""Comma-separated API keys of an endpoint, or hashes of them."""
_HASH = re.compile(r"sha256:([0-9a-f]{32}):([0-9a-f]{64})")


def hash_key(key: str) -> str:
    """``sha256:<salt>:<digest>``; a hash stays what it is."""
    if _HASH.fullmatch(key):
        return key
    salt = secrets.token_hex(16)
    return f"sha256:{salt}:{_digest(salt, key.encode())}"


def _digest(salt: str, key: bytes) -> str:
    return hashlib.sha256(salt.encode() + key).hexdigest()


class KeyRing:
    """The keys of an endpoint; empty is an endpoint that asks for none."""

    def __init__(self, keys: Iterable[str]):
        self._salted = [hash_key(key).split(":")[1:] for key in keys]

    def __bool__(self) -> bool:
        return bool(self._salted)

    def name_of(self, key: bytes) -> str | None:
        """A name for whoever has this key, the same on all replicas; None if it is not one."""
        # Every key is compared, in constant time, so that timing tells nothing about them.
        matches = [hmac.compare_digest(_digest(salt, key), known) for salt, known in self._salted]
        return f"key {self._salted[matches.index(True)][1][:16]}" if any(matches) else None


def check_hashes(field: str, hashes: Iterable[str]) -> None:
    """ValueError, which does not repeat the value: it may be a key."""
    for number, each in enumerate(hashes):
        if not isinstance(each, str) or not _HASH.fullmatch(each):
            raise ValueError(
                f"{field}[{number}] is not allowed: sha256:<salt>:<digest>, as "
                "python -m nanochat_ray.serve.keys prints"
            )


def from_environment() -> list[str]:
    """The keys of ``NANOCHAT_API_KEYS``."""
    return _keys(os.environ.get(VARIABLE, "").split(","))


def from_file(path: str) -> list[str]:
    """Keys, or hashes, between commas and lines. ValueError if there is none, or no such file."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"key_file={path!r} cannot be read: {error}") from None
    keys = _keys(re.split(r"[,\n]", text))
    if not keys:
        raise ValueError(f"key_file={path!r} holds no key")
    return keys


def _keys(parts: Iterable[str]) -> list[str]:
    return [part.strip() for part in parts if part.strip()]


if __name__ == "__main__":
    print("key_hashes:")
    for each in from_environment():
        print(f"  - {hash_key(each)}")
