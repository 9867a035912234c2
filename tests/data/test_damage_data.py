"""Damaged datasets and tokenizers: refused in one line that names the file, never another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat_ray.data.manifest import Manifest, _checksum
from nanochat_ray.data.shards import SequenceReader
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from tests.damage import check_damage
from tests.tiny import TOKENIZER, write_dataset


def content(folder: Path) -> tuple[Manifest, list[bytes]]:
    store = Store.at(str(folder))
    manifest = Manifest.load(store)
    values = []
    for split in ("train", "val"):
        reader = SequenceReader(store, manifest, split)  # type: ignore[arg-type]
        ids, mask = reader.read(np.arange(len(reader)))
        values += [ids.tobytes(), b"" if mask is None else mask.tobytes()]
    return manifest, values


def reseal(folder: Path) -> None:
    """Gives a changed manifest its checksum again, or none, as manifests had before."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    if isinstance(values, dict):
        values.pop("checksum", None)
        path.write_text(json.dumps(values))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["base", "sft"])
def test_no_damaged_dataset_loads(root: Store, kind: str) -> None:
    write_dataset(root, "data", kind, rows=12, length=16)
    folder = Path(root.root) / "datasets" / "data"
    original = content(folder)
    outcomes = check_damage(
        folder, content, same=lambda value: value == original, count=260, seed=1
    )
    assert outcomes["refused"] > 200


@pytest.mark.slow
def test_an_old_manifest_is_read_strictly(root: Store) -> None:
    """Without a checksum, damage that leaves a valid dataset may load; no other does."""
    write_dataset(root, "data", "sft", rows=12, length=16)
    folder = Path(root.root) / "datasets" / "data"
    original = content(folder)
    check_damage(folder, content, same=lambda value: True, count=260, seed=2, reseal=reseal)
    reseal(folder)
    assert content(folder) == original


def test_no_altered_tokenizer_loads(tmp_path: Path) -> None:
    store = Store.at(str(tmp_path / "tokenizer"))
    TOKENIZER.save(store)

    def load(folder: Path) -> Tokenizer:
        return Tokenizer.load(Store.at(str(folder)), TOKENIZER.fingerprint)

    outcomes = check_damage(
        tmp_path / "tokenizer",
        load,
        same=lambda value: value.fingerprint == TOKENIZER.fingerprint,
        count=260,
        seed=3,
    )
    assert outcomes["refused"] > 200
    # Without a fingerprint to compare, what loads is a tokenizer, and what does not is named.
    check_damage(
        tmp_path / "tokenizer",
        lambda folder: Tokenizer.load(Store.at(str(folder))),
        same=lambda value: isinstance(value, Tokenizer),
        count=130,
        seed=4,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "chat"),
        ("tokenizer", "../../x"),
        ("sequence_len", 32.0),
        ("sequence_len", 10**12),
        ("dtype", ">f8"),
        ("splits", {"train": []}),
        ("splits.train", [{"name": "../x", "rows": 1, "size": 1, "sha256": "0" * 64}]),
        ("about.tokens", "many"),
        ("key", None),
    ],
)
def test_a_wrong_field_is_named(root: Store, field: str, value: Any) -> None:
    document = json.loads(write_dataset(root, "data").to_json())
    document.pop("checksum")
    *path, last = field.split(".")
    at = document
    for name in path:
        at = at[name]
    at[last] = value
    with pytest.raises(ValueError, match=rf"^manifest\.json: {field}.* is not allowed: "):
        Manifest.from_json(json.dumps(document))


def test_a_changed_manifest_is_refused(root: Store) -> None:
    document = json.loads(write_dataset(root, "data").to_json())
    assert document.pop("checksum") == _checksum(document)
    document["key"] = "other"
    with pytest.raises(ValueError, match=r"^manifest\.json is damaged"):
        Manifest.from_json(json.dumps(document | {"checksum": "0" * 64}))


@pytest.mark.parametrize("name", ["manifest.json", "train-1.arrow", "val-0.arrow"])
def test_a_damaged_dataset_is_not_up_to_date(
    root: Store, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    from nanochat_ray.data.publish import load_if_up_to_date

    manifest = write_dataset(root, "data")
    store = root.child("datasets", "data")
    assert load_if_up_to_date(store, manifest.key) == manifest
    assert load_if_up_to_date(store, "other") is None
    data = store.read_bytes(name)
    store.write_bytes(name, data[:-9] + b"?" + data[-8:])
    assert load_if_up_to_date(store, manifest.key) is None
    assert name in capsys.readouterr().out.splitlines()[-1]
