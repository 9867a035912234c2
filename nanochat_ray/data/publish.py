"""One dataset while it is prepared: its claim, its shuffle parts, its shards, its manifest.

The first pass scatters sequences into shuffle parts (``ShardWriter``), in a work folder that the
claim's token names. ``DatasetWriter.publish`` gathers the shards from them, and writes the manifest
last, if the claim is still owned: only then does the dataset exist, or become the new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from nanochat_ray.checks import check_name
from nanochat_ray.claim import Claim, hold_claim
from nanochat_ray.data.manifest import FILE, SPLITS
from nanochat_ray.data.map_tasks import MapTasks, TaskResult
from nanochat_ray.data.order import derive_key
from nanochat_ray.data.progress import log
from nanochat_ray.data.shards import Manifest, SequenceReader, Shard, Split, write_shard
from nanochat_ray.data.shuffle import gather, scatter, sequence_dtype
from nanochat_ray.retry import retry
from nanochat_ray.storage import Store

_SHARD_NAME = re.compile(r"[0-9a-f]{12}-(train|val)-\d{5}\.arrow")
_WORK_FOLDER = re.compile(r"parts(-[0-9a-f]{32})?")
SHARD_BYTES = 64 << 20
"""Approximate size of a shard, and more where there would be thousands of them: the second pass
reads each from every shuffle part."""
MAX_SHARD_BYTES = 256 << 20
CHECK_BYTES = 512 << 20
"""Shards of a split up to this total size are verified before a dataset counts as up to date."""
FORMAT = "4"
"""Part of every key: a change of what is written makes old datasets stale."""


def key_of(*values: Any) -> str:
    """A hash (hex) of JSON values, of which everything in a dataset is a function."""
    text = json.dumps([FORMAT, *values], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def num_shards_for(size: float) -> int:
    """Shards for about ``size`` bytes of sequences."""
    return max(1, round(size / min(max(SHARD_BYTES, size / 1024), MAX_SHARD_BYTES)))


def check_replaceable(root: Store, name: str, stage: str) -> None:
    """ValueError if ``datasets/<name>`` is of another stage: runs may have been trained on it."""
    dataset = root.child("datasets", name)
    if not dataset.exists(FILE):
        return
    try:
        kind = Manifest.load(dataset).kind
    except ValueError:
        return  # a damaged dataset is prepared again
    if kind != stage:
        raise ValueError(
            f"dataset={name!r} is not allowed: it was prepared for stage {kind}, and preparing it "
            f"for stage {stage} would replace it; choose another name, or delete {dataset.uri}"
        )


def load_if_up_to_date(dataset: Store, key: str) -> Manifest | None:
    """The manifest, if the dataset was prepared from the same input and its shards are intact."""
    if not dataset.exists(FILE):
        return None
    try:
        manifest = Manifest.load(dataset)
        if manifest.key != key:
            return None
        for split in SPLITS:
            SequenceReader(dataset, manifest, split).check(CHECK_BYTES)
    except ValueError as error:
        # The error of a damaged dataset says to prepare it again, so this must do it.
        log(f"WARNING: {error}; it is prepared again")
        return None
    log(f"dataset {dataset.uri} is up to date: {summary(manifest)}")
    return manifest


def summary(manifest: Manifest) -> str:
    about = manifest.about
    train, val = manifest.num_sequences("train"), manifest.num_sequences("val")
    return (
        f"{train:,} sequences to train on and {val:,} to validate, {manifest.sequence_len:,} "
        f"tokens each; {about.get('tokens', 0) / 1e6:.2f} M tokens from "
        f"{about.get('documents', 0):,} documents, {about.get('share_kept', 1):.2%} of them packed"
    )


@dataclass(frozen=True)
class ShardWriter:
    """Where a task of the first pass writes its sequences: one shuffle part for each split."""

    uri: str
    """The work folder."""
    num_shards: int
    seed: int

    def write(self, split: Split, number: int, ids: np.ndarray, mask: np.ndarray | None) -> str:
        """Scatters the sequences of task ``number``; the part's name, or "" without sequences."""
        if not len(ids):
            return ""
        name = f"{split}-{number:06d}"
        # Validation is a small share of any dataset: one shard.
        num_shards = self.num_shards if split == "train" else 1
        key = derive_key(self.seed, SPLITS.index(split), number)
        work = Store.at(self.uri)
        retry(lambda: scatter(work, name, ids, mask, num_shards, key), f"{name} of {self.uri}")
        return name


@dataclass(frozen=True, kw_only=True)
class _GatherShard:
    """Work of one task of the second pass: one shard from all shuffle parts of its split."""

    dataset_uri: str
    work_uri: str
    shuffle_parts: Mapping[Split, Sequence[str]]
    prefix: str
    dtype: np.dtype
    """Of a sequence in a shuffle part."""
    tokenizer: str
    seed: int

    def __call__(self, item: Any) -> TaskResult:
        split, number = item
        key = derive_key(self.seed, SPLITS.index(split))
        name = f"{self.prefix}-{split}-{number:05d}.arrow"
        work, dataset = Store.at(self.work_uri), Store.at(self.dataset_uri)

        def gather_and_write() -> Shard:
            ids, mask = gather(work, self.shuffle_parts[split], number, key, self.dtype)
            return write_shard(dataset, name, ids, mask, self.tokenizer)

        shard = retry(gather_and_write, f"{name} of {self.dataset_uri}")
        return {"split": split, "number": number, "shard": asdict(shard)}


class DatasetWriter:
    """The folder of one dataset, of which this process owns the claim."""

    def __init__(self, root: Store, name: str, ownership: Claim, map_tasks: MapTasks):
        self.root, self.store = root, root.child("datasets", name)
        self.map_tasks = map_tasks
        self._claim = ownership
        self._work = f"parts-{ownership.owner.token}"

    def load_if_up_to_date(self, key: str) -> Manifest | None:
        return load_if_up_to_date(self.store, key)

    def shard_writer(self, size: float, seed: int) -> ShardWriter:
        """For about ``size`` bytes of sequences."""
        return ShardWriter(self.store.child(self._work).uri, num_shards_for(size), seed)

    def publish(self, draft: Manifest, results: Sequence[TaskResult], out: ShardWriter) -> Manifest:
        """Gathers the shards from the parts that ``results`` name, in parallel; then publishes.

        Returns ``draft`` with the shards in it. Shards that it does not name are deleted. Raises
        ValueError if a split is empty, ClaimLostError if another process took over.
        """
        parts = {split: [r[split] for r in results if r[split]] for split in SPLITS}
        for split in SPLITS:
            if not parts[split]:
                raise ValueError(
                    f"there is too little input: not one sequence of {draft.sequence_len + 1} "
                    f"tokens for the {split} split; give more, or a smaller sequence_len"
                )
        work = _GatherShard(
            dataset_uri=self.store.uri,
            work_uri=out.uri,
            shuffle_parts=parts,
            prefix=draft.key[:12],
            dtype=sequence_dtype(
                np.dtype(draft.dtype), draft.sequence_len + 1, has_mask=draft.kind == "sft"
            ),
            tokenizer=draft.tokenizer,
            seed=out.seed,
        )
        plan = [["train", number] for number in range(out.num_shards)] + [["val", 0]]
        gathers = sorted(self.map_tasks(plan, work), key=lambda result: result["number"])
        splits: dict[str, list[Shard]] = {}
        for split in SPLITS:
            shards = [Shard(**result["shard"]) for result in gathers if result["split"] == split]
            splits[split] = [shard for shard in shards if shard.num_sequences]
        manifest = replace(draft, splits=splits)
        retry(lambda: self._commit(manifest), f"dataset {self.store.uri}")
        return manifest

    def _commit(self, manifest: Manifest) -> None:
        live = {shard.name for shards in manifest.splits.values() for shard in shards}
        # Listed before the claim is checked: shards of a successor are never among them. Only
        # files that a preparation wrote: users may keep others beside them.
        stale = [n for n in self.store.list() if _SHARD_NAME.fullmatch(n) and n not in live]
        self._claim.check()
        self.store.write_text(FILE, manifest.to_json())
        for name in stale:
            self.store.delete(name)

    def delete_old_work(self) -> None:
        """Deletes the work folders of preparations that were killed."""
        for name in self.store.list():
            if _WORK_FOLDER.fullmatch(name):
                self.store.delete(name)

    def delete_work(self) -> None:
        self.store.delete(self._work)

    def check_claim(self) -> None:
        """ClaimLostError if another process took over."""
        self._claim.check()


@contextlib.contextmanager
def open_dataset(
    storage: str, name: str, stage: str, map_tasks: MapTasks
) -> Iterator[DatasetWriter]:
    """Claims ``datasets/<name>`` below ``storage`` for one preparation at a time.

    Raises ValueError, naming the owner, if the dataset is being prepared, or if it is of another
    ``stage``; ClaimLostError in place of other errors once another process has taken over.
    """
    check_name("dataset", name)
    root = Store.at(storage)
    with hold_claim(root, "datasets", name) as ownership:
        check_replaceable(root, name, stage)
        writer = DatasetWriter(root, name, ownership, map_tasks)
        writer.delete_old_work()
        try:
            yield writer
        except (ValueError, OSError):
            # The successor deletes this preparation's work folder, so files may be missing.
            with contextlib.suppress(OSError):
                writer.check_claim()
            raise
        finally:
            with contextlib.suppress(OSError):
                writer.delete_work()
