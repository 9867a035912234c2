"""API keys as a deployment stores them: salted hashes, which do not reveal the keys.

    NANOCHAT_API_KEYS=key1,key2 python -m nanochat_ray.serve.keys    # lines for cluster/serve.yaml

Use long random keys (``openssl rand -hex 24``): a short one can be recovered from its hash.
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
    """``sha256:<salt>:<digest>``; a hash is returned unchanged."""
    if _HASH.fullmatch(key):
        return key
    salt = secrets.token_hex(16)
    return f"sha256:{salt}:{_digest(salt, key.encode())}"


def _digest(salt: str, key: bytes) -> str:
    return hashlib.sha256(salt.encode() + key).hexdigest()


class KeyRing:
    """The keys of an endpoint; an empty ring is an endpoint without authentication."""

    def __init__(self, keys: Iterable[str]):
        self._hashes = [hash_key(key).split(":")[1:] for key in keys]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def name_of(self, key: bytes) -> str | None:
        """A name for the owner of the key, the same on all replicas; None for an unknown key."""
        # Every key is compared, in constant time, so that timing reveals nothing.
        matches = [hmac.compare_digest(_digest(salt, key), digest) for salt, digest in self._hashes]
        return f"key {self._hashes[matches.index(True)][1][:16]}" if any(matches) else None


def check_hashes(field: str, hashes: Iterable[str]) -> None:
    """Raises ValueError, without the value: it may be a key."""
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
    """Keys or hashes, separated by commas or lines. ValueError if there are none, or no file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
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
