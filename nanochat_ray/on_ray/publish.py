"""From the parts that tasks wrote to a dataset: shuffle, write the shards, then the manifest."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from nanochat_ray.data.order import derive_key
from nanochat_ray.data.shards import Manifest, SequenceReader, Shard, Split, write_shard
from nanochat_ray.data.shuffle import gather
from nanochat_ray.on_ray.mapping import Row, mapped, say
from nanochat_ray.storage import Store

SPLITS: tuple[Split, ...] = ("train", "val")
_SHARD = re.compile(r"[0-9a-f]{12}-(train|val)-\d{5}\.arrow")
SHARD_BYTES = 64 << 20
"""What a shard is to have, about."""
CHECKED_BYTES = 512 << 20
"""Shards of a split up to this size together are checked before a dataset is up to date."""
FORMAT = "4"
"""Part of every key: a change of what is written makes old datasets stale."""


def key_of(*values: Any) -> str:
    """A hash (hex) of JSON values, of which everything in a dataset is a function."""
    text = json.dumps([FORMAT, *values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def shards_for(size: float) -> int:
    """Shards for about ``size`` bytes of rows."""
    return max(1, round(size / SHARD_BYTES))


def check_replaceable(root: Store, name: str, stage: str) -> None:
    """ValueError if ``datasets/<name>`` is a dataset of another stage, which runs may rest on."""
    dataset = root.child("datasets", name)
    if not dataset.exists("manifest.json"):
        return
    try:
        kind = Manifest.load(dataset).kind
    except ValueError:
        return  # a damaged one is made again
    if kind != stage:
        raise ValueError(
            f"dataset={name!r} is not allowed: it was prepared for stage {kind}, and preparing it "
            f"for stage {stage} would replace it; choose another name, or delete {dataset.uri}"
        )


def unchanged(dataset: Store, key: str) -> Manifest | None:
    """The manifest, if the dataset was prepared from the same input before."""
    if not dataset.exists("manifest.json"):
        return None
    try:
        manifest = Manifest.load(dataset)
        if manifest.key != key:
            return None
        for split in SPLITS:
            SequenceReader(dataset, manifest, split).check(CHECKED_BYTES)
    except ValueError as error:
        # Who is told to prepare a damaged dataset again must be able to.
        say(f"WARNING: {error}; it is made again")
        return None
    say(f"dataset {dataset.uri} is up to date: {summary(manifest)}")
    return manifest


def summary(manifest: Manifest) -> str:
    about = manifest.about
    train, val = manifest.num_sequences("train"), manifest.num_sequences("val")
    return (
        f"{train:,} sequences to train on and {val:,} to validate, {manifest.sequence_len:,} "
        f"tokens each; {about.get('tokens', 0) / 1e6:.2f} M tokens from "
        f"{about.get('documents', 0):,} documents, {about.get('share_kept', 1):.2%} of them packed"
    )


def publish(
    dataset: Store, draft: Manifest, parts: Mapping[Split, Sequence[str]], shards: int, seed: int
) -> Manifest:
    """Gathers the shards from ``parts`` (files of ``dataset``'s folder ``parts``), in parallel.

    Returns ``draft`` with the shards in it; once that is written, the dataset is the new one, and
    shards that the manifest does not name are cleared away. Raises ValueError if a split is empty.
    """
    for split in SPLITS:
        if not parts[split]:
            raise ValueError(
                f"there is too little input: not one row of {draft.sequence_len + 1} tokens for "
                f"the {split} split; give more, or a smaller sequence_len"
            )
    uri, prefix, fingerprint = dataset.uri, draft.key[:12], draft.tokenizer

    def make(item: list[Any]) -> Row:
        split, number = item
        store = Store.at(uri)
        key = derive_key(seed, SPLITS.index(split))
        ids, mask = gather(store.child("parts"), parts[split], number, key)
        name = f"{prefix}-{split}-{number:05d}.arrow"
        shard = write_shard(store, name, ids, mask, fingerprint)
        return {"split": split, "number": number, "shard": asdict(shard)}

    # Validation is a small share of any dataset: one shard.
    plan = [["train", number] for number in range(shards)] + [["val", 0]]
    made = sorted(mapped(plan, make), key=lambda row: row["number"])
    splits: dict[str, list[Shard]] = {}
    for split in SPLITS:
        found = [Shard(**row["shard"]) for row in made if row["split"] == split]
        splits[split] = [shard for shard in found if shard.num_sequences]
    manifest = replace(draft, splits=splits)
    dataset.write_text("manifest.json", manifest.to_json())
    named = {shard.name for shards in splits.values() for shard in shards}
    for name in dataset.list():
        # Only what a preparation wrote: what people put beside it is theirs.
        if name == "parts" or (_SHARD.fullmatch(name) and name not in named):
            dataset.delete(name)
    return manifest
