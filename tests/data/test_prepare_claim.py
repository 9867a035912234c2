"""Two preparations of one dataset: one of them at most publishes, and they never mix."""

from __future__ import annotations

import errno
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from nanochat_ray.claim import ClaimLostError, Owner, hold_claim
from nanochat_ray.cli import entry
from nanochat_ray.data.map_tasks import TaskResult, Work, map_serially
from nanochat_ray.data.prepare import prepare_base, prepare_sft
from nanochat_ray.data.shards import Manifest
from nanochat_ray.storage import Store
from nanochat_ray.tasks.mixture import Mixture
from nanochat_ray.text.tokenizer import Tokenizer
from tests.outage import Outage

TOKENIZER = Tokenizer.bytes_only()


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "book.txt").write_text("".join(f"{i} is a number.\n" for i in range(3000)))
    return str(tmp_path / "book.txt")


def take_over(root: Store) -> None:
    """As a successor on another machine does after this owner's lease."""
    folder = root.child("claims", "datasets", "data")
    owner = Owner.here("e" * 32)
    assert folder.create("00000002.json", owner.to_json().encode())


@pytest.mark.parametrize("lost_before", ["tokenize", "gather", "manifest"])
@pytest.mark.parametrize("stage", ["base", "sft"])
def test_a_lost_claim_publishes_nothing(
    root: Store, text: str, lost_before: str, stage: str
) -> None:
    calls = 0

    def map_tasks(plan: Sequence[Any], work: Work, /) -> Iterator[TaskResult]:
        nonlocal calls
        calls += 1
        if calls == 1 + (lost_before == "gather") + (lost_before == "manifest"):
            if lost_before != "manifest":
                take_over(root)
            yield from map_serially(plan, work)
            if lost_before == "manifest":
                take_over(root)
        else:
            yield from map_serially(plan, work)

    mixture = Mixture((("identity", 60),), (), seed=0)
    prepare: Any = functools.partial(prepare_base, text=[text])
    if stage == "sft":
        prepare = functools.partial(prepare_sft, mixture=mixture)
    with pytest.raises(ClaimLostError, match="another job has taken over datasets/data") as error:
        prepare(root.uri, "data", map_tasks=map_tasks, tokenizer=TOKENIZER)
    assert "\n" not in str(entry.explain(error.value))
    names = root.list("datasets/data")
    assert not [name for name in names if not name.endswith(".arrow")]


@pytest.mark.parametrize("after_bytes", [None, 100])
def test_a_preparation_waits_for_storage(
    root: Store, text: str, monkeypatch: pytest.MonkeyPatch, after_bytes: int | None
) -> None:
    options: dict[str, Any] = {"text": [text], "tokenizer": TOKENIZER, "sequence_len": 64}
    manifest = prepare_base(root.uri, "sound", map_tasks=map_serially, **options)
    outage = Outage(monkeypatch)
    outage.only = "storage/datasets"
    outage.after_bytes, outage.most_failures = after_bytes, 5

    def map_tasks(plan: Sequence[Any], work: Work, /) -> Iterator[TaskResult]:
        outage.is_on, outage.num_failures = True, 0
        yield from map_serially(plan, work)
        assert outage.num_failures >= 5
        outage.is_on = False

    assert prepare_base(root.uri, "data", map_tasks=map_tasks, **options).splits == manifest.splits


def test_a_preparation_ends_at_a_full_disk(
    root: Store, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outage = Outage(monkeypatch)
    outage.only = "storage/datasets"  # not the claim, which a thread renews
    outage.error = lambda: OSError(errno.ENOSPC, "No space left on device", "/full/x")

    def map_tasks(plan: Sequence[Any], work: Work, /) -> Iterator[TaskResult]:
        outage.is_on = True
        try:
            yield from map_serially(plan, work)
        finally:
            outage.is_on = False

    with pytest.raises(OSError, match="No space left"):
        prepare_base(root.uri, "data", map_tasks=map_tasks, text=[text], tokenizer=TOKENIZER)
    assert outage.num_failures == 1
    assert not root.exists("datasets/data/manifest.json")


def test_a_lost_claim_keeps_the_old_dataset(root: Store, text: str) -> None:
    options: dict[str, Any] = {"text": [text], "tokenizer": TOKENIZER, "sequence_len": 64}
    manifest = prepare_base(root.uri, "data", map_tasks=map_serially, **options)
    (root.child("claims", "datasets", "data")).delete("00000001.json")

    def map_tasks(plan: Sequence[Any], work: Work, /) -> Iterator[TaskResult]:
        yield from map_serially(plan, work)
        folder = root.child("claims", "datasets", "data")
        folder.write_text("00000009.json", Owner.here("e" * 32).to_json())

    with pytest.raises(ClaimLostError):
        prepare_base(root.uri, "data", map_tasks=map_tasks, **options, seed=1)
    dataset = root.child("datasets", "data")
    assert Manifest.load(dataset) == manifest
    for shards in manifest.splits.values():
        assert all(dataset.exists(shard.name) for shard in shards)


def test_a_successor_that_deletes_files_is_named(root: Store, text: str) -> None:
    """The loser of a claim may miss files; its error is the claim, not the files."""

    def map_tasks(plan: Sequence[Any], work: Work, /) -> Iterator[TaskResult]:
        yield from map_serially(plan, work)
        take_over(root)
        dataset = root.child("datasets", "data")
        for name in dataset.list():
            dataset.delete(name)

    with pytest.raises(ClaimLostError):
        prepare_base(root.uri, "data", map_tasks=map_tasks, text=[text], tokenizer=TOKENIZER)


def test_work_folders_are_named_by_the_claim(root: Store, text: str) -> None:
    dataset = root.child("datasets", "data")
    dataset.write_text(f"parts-{'0' * 32}/train-000000.arrow", "of a preparation that was killed")
    dataset.write_text("parts/train-000000.arrow", "of an older version")
    dataset.write_text("notes.txt", "a user's file")
    folders = []

    def map_tasks(plan: Sequence[Any], work: Work, /) -> Iterator[TaskResult]:
        yield from map_serially(plan, work)
        folders.append([name for name in dataset.list() if name.startswith("parts")])

    prepare_base(root.uri, "data", map_tasks=map_tasks, text=[text], tokenizer=TOKENIZER)
    token = json.loads(root.read_text("claims/datasets/data/00000001.json"))["token"]
    assert folders == [[f"parts-{token}"]] * 2
    names = dataset.list()
    assert not [name for name in names if name.startswith("parts")]
    assert "notes.txt" in names


def test_a_second_preparation_is_refused(root: Store, text: str) -> None:
    with (
        hold_claim(root, "datasets", "data"),
        pytest.raises(ValueError, match=r"datasets/data of .* is in use: process"),
    ):
        prepare_base(root.uri, "data", map_tasks=map_serially, text=[text], tokenizer=TOKENIZER)


def test_another_stage_does_not_replace_a_dataset(root: Store, text: str) -> None:
    manifest = prepare_base(
        root.uri, "data", map_tasks=map_serially, text=[text], tokenizer=TOKENIZER
    )
    mixture = Mixture((("identity", 60),), (), seed=0)
    with pytest.raises(ValueError, match=r"^dataset='data' is not allowed: .* for stage base"):
        prepare_sft(root.uri, "data", map_tasks=map_serially, mixture=mixture, tokenizer=TOKENIZER)
    dataset = root.child("datasets", "data")
    assert Manifest.load(dataset) == manifest
    dataset.write_text("manifest.json", "{")  # a damaged one may be replaced
    prepare_sft(root.uri, "data", map_tasks=map_serially, mixture=mixture, tokenizer=TOKENIZER)
    assert Manifest.load(dataset).kind == "sft"
