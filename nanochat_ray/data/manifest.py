"""The manifest of a dataset: its shards, how it was prepared, and strict validation on load."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

from nanochat_ray.checks import short_repr
from nanochat_ray.storage import Store

Split = Literal["train", "val"]
SPLITS: tuple[Split, ...] = ("train", "val")
FILE = "manifest.json"
MAX_SEQUENCE_LEN = 1 << 24
_HASH = re.compile(r"[0-9a-f]{64}")
_STORED_NAMES = {"num_sequences": "rows"}
"""Fields whose name in ``manifest.json`` is an older one."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")


@dataclass(frozen=True, kw_only=True)
class Shard:
    name: str
    num_sequences: int
    """``rows`` in the file."""
    size: int
    """Bytes of the file."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a dataset and its origin; without a manifest a dataset does not exist."""

    kind: Literal["base", "sft"]
    tokenizer: str
    """Fingerprint."""
    sequence_len: int
    """T; a stored sequence holds T + 1 ids."""
    dtype: str
    splits: dict[str, list[Shard]]
    key: str
    """Hash of everything the shards depend on: equal keys, equal shards."""
    about: dict[str, Any] = field(default_factory=dict)
    """Parameters and statistics of the preparation."""

    def num_sequences(self, split: str) -> int:
        return sum(shard.num_sequences for shard in self.splits[split])

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the content: of all that the batches of a training run depend on.

        Unlike ``key`` it covers the sequences themselves and not their origin: input that was
        copied or touched gives the same digest, other bytes never do.
        """
        shards = {
            split: [(shard.num_sequences, shard.sha256) for shard in self.splits[split]]
            for split in sorted(self.splits)
        }
        values = [self.kind, self.tokenizer, self.sequence_len, self.dtype, shards]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def to_json(self) -> str:
        values = self._as_stored()
        return json.dumps(values | {"checksum": _checksum(values)}, indent=1, sort_keys=True)

    def _as_stored(self) -> dict[str, Any]:
        """The fields as ``manifest.json`` names them."""
        values = dataclasses.asdict(self)
        values["splits"] = {
            split: [
                {_STORED_NAMES.get(name, name): shard[name] for name in shard} for shard in shards
            ]
            for split, shards in values["splits"].items()
        }
        return values

    @classmethod
    def from_json(cls, text: str, where: str = FILE) -> Manifest:
        """Raises ValueError, naming ``where`` and the field, if ``text`` is no manifest.

        The checksum may be missing, as in manifests that were written before there was one.
        """
        values = _object(_parse(text, where), where, "the document")
        checksum = values.pop("checksum", None)
        names = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"{where}: field {unknown[0][:40]!r} is not known")
        if missing := sorted(names - set(values) - {"about"}):
            raise ValueError(f"{where}: field {missing[0]!r} is missing")
        about = _object(values.get("about", {}), where, "about")
        for name in ("tokens", "documents", "share_kept"):
            value = about.get(name, 0)
            if type(value) not in (int, float) or not 0 <= value <= 1e18:
                _refuse(where, f"about.{name}", value, "a number from 0")
        split_names = set(_object(values["splits"], where, "splits"))
        if split_names != set(SPLITS):
            _refuse(where, "splits", sorted(split_names), " and ".join(SPLITS))
        sequence_len = _whole(values["sequence_len"], where, "sequence_len")
        if sequence_len > MAX_SEQUENCE_LEN:
            _refuse(where, "sequence_len", sequence_len, f"up to {MAX_SEQUENCE_LEN:,}")
        manifest = cls(
            kind=_one_of(values["kind"], where, "kind", "base", "sft"),
            tokenizer=_matching(values["tokenizer"], where, "tokenizer", _HASH, "a SHA-256 (hex)"),
            sequence_len=sequence_len,
            dtype=_one_of(values["dtype"], where, "dtype", "uint16", "uint32"),
            splits={s: _shards(values["splits"][s], where, f"splits.{s}") for s in SPLITS},
            key=_matching(values["key"], where, "key", re.compile(".{1,200}"), "a text"),
            about=about,
        )
        if checksum is not None and checksum != _checksum(manifest._as_stored()):
            raise ValueError(
                f"{where} is damaged: its content does not have the checksum that it names; "
                "prepare the dataset again"
            )
        return manifest

    @classmethod
    def load(cls, store: Store) -> Manifest:
        """Raises ValueError, naming the file, if it is missing or no manifest."""
        where = f"{store.uri}/{FILE}"
        try:
            data = store.read_bytes(FILE)
        except OSError as error:
            raise ValueError(f"{where} cannot be read: {error}") from None
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{where} is not UTF-8 text (byte {error.start})") from None
        return cls.from_json(text, where)


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _refuse(where: str, name: str, value: Any, requirement: str) -> NoReturn:
    raise ValueError(f"{where}: {name}={short_repr(value)} is not allowed: {requirement}") from None


def _parse(text: str, where: str) -> Any:
    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is no number")

    try:
        return json.loads(text, parse_constant=constant)
    except RecursionError:
        raise ValueError(f"{where} is not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _object(value: Any, where: str, name: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        _refuse(where, name, value, "a JSON object")
    return value


def _whole(value: Any, where: str, name: str) -> int:
    if type(value) is not int or not 1 <= value < 2**48:
        _refuse(where, name, value, "a whole number from 1 to 2^48")
    return value


def _matching(value: Any, where: str, name: str, pattern: re.Pattern[str], requirement: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        _refuse(where, name, value, requirement)
    return value


def _one_of(value: Any, where: str, name: str, *choices: str) -> Any:
    if not isinstance(value, str) or value not in choices:
        _refuse(where, name, value, " or ".join(choices))
    return value


def _shards(values: Any, where: str, name: str) -> list[Shard]:
    if not isinstance(values, list) or not values:
        _refuse(where, name, values, "a list of shards")
    fields = {_STORED_NAMES.get(f.name, f.name) for f in dataclasses.fields(Shard)}
    shards = []
    for i, value in enumerate(values):
        at = f"{name}[{i}]"
        if set(_object(value, where, at)) != fields:
            _refuse(where, at, sorted(value), f"the fields {', '.join(sorted(fields))}")
        shards.append(
            Shard(
                name=_matching(value["name"], where, f"{at}.name", _NAME, "a file name"),
                num_sequences=_whole(value["rows"], where, f"{at}.rows"),
                size=_whole(value["size"], where, f"{at}.size"),
                sha256=_matching(value["sha256"], where, f"{at}.sha256", _HASH, "a SHA-256 (hex)"),
            )
        )
    return shards
