"""Preparation without Ray: real text in, sequences that decode to it out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat_ray.checkpoint.find_tokenizer import find_tokenizer
from nanochat_ray.data import prepare
from nanochat_ray.data.map_tasks import map_serially
from nanochat_ray.data.shards import Manifest, SequenceReader
from nanochat_ray.storage import Store
from nanochat_ray.tasks.conversations import Entry
from nanochat_ray.tasks.mixture import Mixture
from nanochat_ray.text.chat import Message
from nanochat_ray.text.tokenizer import Tokenizer
from tests.processes import run_job
from tests.rl.tiny_rl import EvenFirst

REPO = Path(__file__).parents[2]


def prepare_base(root: Store, name: str, **options: Any) -> Manifest:
    return prepare.prepare_base(root.uri, name, map_tasks=map_serially, **options)


def prepare_sft(
    root: Store,
    name: str,
    tasks: Sequence[tuple[str, int]] = (),
    chats: Sequence[Entry] = (),
    **options: Any,
) -> Manifest:
    mixture = Mixture.load(tasks, chats, seed=0)
    return prepare.prepare_sft(root.uri, name, map_tasks=map_serially, mixture=mixture, **options)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of one file, and a few notes: 200 kB."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["the", "sea", "was", "calm", "and", "Ishmael", "slept", "till", "morning", "came"]
    verses = [" ".join(rng.choice(words, 20)) + f" {i}.\n" for i in range(1800)]
    (folder / "book.txt").write_text("".join(verses))
    notes = [json.dumps({"text": f"Note {i}: " + " ".join(rng.choice(words, 9))}) for i in range(9)]
    (folder / "notes.jsonl").write_text("\n".join(notes))
    return folder


def rows_of(dataset: Store, manifest: Manifest, split: str) -> np.ndarray:
    reader = SequenceReader(dataset, manifest, split)  # type: ignore[arg-type]
    return reader.read(np.arange(len(reader)))[0]


@pytest.mark.parametrize("where", ["folder", "s3"])
def test_text_becomes_sequences(
    request: pytest.FixtureRequest,
    root: Store,
    text: Path,
    where: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uris = [str(text)]
    if where == "s3":
        root = Store.at(request.getfixturevalue("s3")).child(uuid.uuid4().hex)
        for path in text.iterdir():
            root.write_bytes(f"text/{path.name}", path.read_bytes())
        uris = [root.child("text").uri]
    options = {"text": uris, "vocab_size": 400, "sequence_len": 64}
    manifest = prepare_base(root, "book", **options)
    dataset = root.child("datasets", "book")
    assert Manifest.load(dataset) == manifest
    shards = [shard.name for split in manifest.splits.values() for shard in split]
    assert dataset.list() == sorted([*shards, "manifest.json"])
    tokenizer, sequence_len = find_tokenizer(root, "book")
    assert (tokenizer.fingerprint, sequence_len) == (manifest.tokenizer, 64)
    assert tokenizer.vocab_size == 400
    assert manifest.about["share_kept"] > 0.97
    train, val = (rows_of(dataset, manifest, split) for split in ("train", "val"))
    assert len(train) == manifest.num_sequences("train") > 10 * len(val) > 0
    for rows in (train, val):
        assert rows.shape[1] == 65
        assert (rows[:, 0] == tokenizer.bos).all()
    num_tokens = (train != tokenizer.bos).sum() + (val != tokenizer.bos).sum()
    assert num_tokens == round(manifest.about["share_kept"] * manifest.about["tokens"])

    # What is held out is not trained on: verses are numbered.
    def verses(rows: np.ndarray) -> set[str]:
        lines = "\n".join(tokenizer.decode(row[1:]) for row in rows).split("\n")
        return {line for line in lines if line.endswith(".") and line.startswith("the sea")}

    assert verses(val)
    assert not verses(val) & verses(train)

    capsys.readouterr()
    assert prepare_base(root, "book", **options) == manifest
    assert "up to date" in capsys.readouterr().out
    twin = prepare_base(root, "twin", **options)
    assert "trained before" in capsys.readouterr().out
    assert twin.splits == manifest.splits
    other = prepare_base(root, "book", **options, seed=1)
    other_train = rows_of(dataset, other, "train")
    assert not np.array_equal(other_train, train)
    assert np.array_equal(
        np.sort(other_train.view("V130"), axis=0), np.sort(train.view("V130"), axis=0)
    )


def test_a_bad_file_keeps_the_old_dataset(root: Store, text: Path, tmp_path: Path) -> None:
    manifest = prepare_base(root, "book", text=[str(text)], vocab_size=300, sequence_len=64)
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"ab\0cd")
    for uris, error in (
        ([str(bad)], r"bad\.txt is binary"),
        ([f"{tmp_path}/*.md"], "names no file"),
    ):
        with pytest.raises(ValueError, match=error):
            prepare_base(root, "book", text=uris, vocab_size=300, sequence_len=64)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="there is too little input"):
        prepare_base(root, "book", text=[f"{tmp_path}/short.txt"], vocab_size=300)
    assert Manifest.load(root.child("datasets", "book")) == manifest
    with pytest.raises(ValueError, match=r"dataset='\.\./x' is not allowed"):
        prepare_base(root, "../x")


def test_duplicates_and_bad_lines_are_counted(
    root: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        json.dumps({"body": f"Note {i % 300}: the sea was calm that day."}) for i in range(900)
    ]
    lines[10] = "{"
    lines[20] = json.dumps({"body": None})
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.jsonl").write_text("\n".join(lines))
    options = {
        "text": [str(tmp_path / "text")],
        "vocab_size": 300,
        "sequence_len": 32,
        "text_column": "body",
    }
    with pytest.raises(ValueError, match=r"notes\.jsonl, line 11: not a JSON object"):
        prepare_base(root, "notes", **options)
    manifest = prepare_base(root, "notes", **options, skip_bad=True)
    assert manifest == Manifest.load(root.child("datasets", "notes"))
    assert (manifest.about["documents"], manifest.about["duplicates"]) == (898, 598)
    assert manifest.about["skipped"]["count"] == 1
    assert manifest.num_sequences("train") > manifest.num_sequences("val") > 0
    output = capsys.readouterr().out
    assert "598 of 898 documents are copies of others" in output
    assert "WARNING: 1 files, lines or rows cannot be read" in output
    assert "notes.jsonl, line 11" in output
    (tmp_path / "notes.jsonl").write_text("")
    (tmp_path / "same.txt").write_text("the same line again and again\n" * 20_000)
    options["text"] = [str(tmp_path / "same.txt")]
    manifest = prepare_base(root, "same", **options)
    assert manifest.num_sequences("train") > 3 * manifest.num_sequences("val") > 0
    assert "WARNING: too little of the text differs" in capsys.readouterr().out


class Silent(EvenFirst):
    """Its assistant says nothing, or what is no text."""

    def example(self, index: int) -> list[Message]:
        answer = [{"role": "assistant", "content": 7}] if self.text.endswith("wrong") else []
        return [*self.question(index), *answer]


@pytest.mark.parametrize(
    ("task", "error"),
    [
        ("Silent", "no message of the assistant's has a loss"),
        ("Silent,extra=wrong", r"messages\[1\]\.content: a text or parts are expected, not 7"),
    ],
)
def test_what_teaches_nothing_is_refused(root: Store, task: str, error: str) -> None:
    name = f"{__name__}.{task}"
    message = rf"^{re.escape(name)}, conversation 0 of the split (train|val): {error}"
    with pytest.raises(ValueError, match=message):
        prepare_sft(root, "chat", tokenizer=Tokenizer.bytes_only(), tasks=[(name, 3)])
    assert not root.exists("datasets/chat/manifest.json")


def test_tasks_become_sequences(root: Store) -> None:
    tok = Tokenizer.bytes_only()
    tasks = [("chain_sum", 120), ("identity", 60)]
    manifest = prepare_sft(root, "chat", tokenizer=tok, tasks=tasks, sequence_len=512)
    assert find_tokenizer(root, "chat")[0].fingerprint == tok.fingerprint
    by_fingerprint, sequence_len = find_tokenizer(root, tok.fingerprint[:8])
    assert (by_fingerprint.fingerprint, sequence_len) == (tok.fingerprint, None)
    assert manifest.kind == "sft"
    assert manifest.about["share_kept"] > 0.97
    reader = SequenceReader(root.child("datasets", "chat"), manifest, "train")
    ids, mask = reader.read(np.arange(len(reader)))
    assert mask is not None
    assert (ids[:, 0] == tok.bos).all()
    assert not mask[ids == tok.bos].any()
    assert mask.sum() > 0
    everything = tok.decode(ids.reshape(-1))
    for mark in tok.specials:
        assert mark in everything
    loss_text = tok.decode(ids[mask == 1])
    assert "<|assistant_end|>" in loss_text
    assert "<|user_start|>" not in loss_text
    assert "<|output_start|>" not in loss_text
    with pytest.raises(ValueError, match="task='nothing' is not known"):
        prepare_sft(root, "chat", tokenizer=tok, tasks=[("nothing", 10)])
    with pytest.raises(
        ValueError, match=r"tokenizer='ffff' is no dataset, no run and no fingerprint"
    ):
        find_tokenizer(root, "ffff")


def test_another_tokenizer_can_be_used(root: Store, text: Path) -> None:
    options = {"text": [str(text)], "sequence_len": 64}
    first = prepare_base(root, "first", **options, vocab_size=400)
    tokenizer, _ = find_tokenizer(root, "first")
    again = prepare_base(root, "again", **options, tokenizer=tokenizer)
    other = prepare_base(root, "other", **options, tokenizer=Tokenizer.bytes_only())
    shas = [[s.sha256 for s in m.splits["train"]] for m in (first, again)]
    assert (again.tokenizer, shas[1]) == (first.tokenizer, shas[0])
    assert other.tokenizer == Tokenizer.bytes_only().fingerprint
    assert find_tokenizer(root, "other")[0].fingerprint == other.tokenizer


def test_files_of_conversations_become_sequences(root: Store, tmp_path: Path) -> None:
    lines = []
    for i in range(60):
        answers = [
            {"role": "assistant", "content": f"{word} {i}.", "weight": weight}
            for word, weight in (("left out", 0), ("learnt", 1))
        ]
        asks = [{"role": "user", "content": f"Which is number {i}?"}] * 2
        turns = [turn for pair in zip(asks, answers, strict=True) for turn in pair]
        lines.append(json.dumps({"messages": turns}))
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(lines))
    tok = Tokenizer.bytes_only()
    chats, tasks = [Entry(str(path), passes=2.0)], [("identity", 60)]
    options = {"tokenizer": tok, "tasks": tasks, "chats": chats, "sequence_len": 512}
    manifest = prepare_sft(root, "chat", **options)
    assert ["identity", 60] in manifest.about["tasks"]
    assert [f"chats:{path}", 114] in manifest.about["tasks"]
    dataset = root.child("datasets", "chat")
    text, learnt = {}, {}
    for split in ("train", "val"):
        reader = SequenceReader(dataset, manifest, split)  # type: ignore[arg-type]
        ids, mask = reader.read(np.arange(len(reader)))
        assert mask is not None
        text[split], learnt[split] = tok.decode(ids.reshape(-1)), tok.decode(ids[mask == 1])
    assert sum(text["train"].count(f" learnt {i}.") for i in range(60)) == 0
    counts = [text["train"].count(f">learnt {i}.<") for i in range(60)]
    held_out = [i for i in range(60) if f">learnt {i}.<" in text["val"]]
    assert len(held_out) == 3
    assert counts == [0 if i in held_out else 2 for i in range(60)]
    assert "left out" in text["train"]
    assert "left out" not in learnt["train"] + learnt["val"]
    assert prepare_sft(root, "chat", **options) == manifest
    path.write_text("\n".join([*lines, "{}"]))
    with pytest.raises(ValueError, match=r"my\.jsonl, line 61: "):
        prepare_sft(root, "chat", **options)
    assert Manifest.load(dataset) == manifest


def test_digests_are_those_of_earlier_versions(root: Store, tmp_path: Path) -> None:
    """Recorded: another digest means that runs on prepared datasets cannot be reproduced."""
    numbers = [f"The number {i} is followed by {i + 1}.\n" for i in range(2000)]
    (tmp_path / "numbers.txt").write_text("".join(numbers))
    base = prepare_base(
        root, "base", text=[f"{tmp_path}/numbers.txt"], vocab_size=300, sequence_len=32
    )
    assert base.digest == "806e2c75f9692a040e4553184b8af592d84f8a4fee34dd4634f658b8febbd401"
    chat = prepare_sft(root, "chat", tasks=[("identity", 60)], tokenizer=Tokenizer.bytes_only())
    assert chat.digest == "369d4b5678c56f16df85a7a33e2aa32d93ed7354546bf4b335622f88a4b5fd71"


@pytest.fixture
def light(tmp_path: Path) -> dict[str, str]:
    """An environment where neither Ray nor torch, which takes a second, can be imported."""
    (tmp_path / "path").mkdir()
    for name in ("ray", "torch"):
        (tmp_path / "path" / f"{name}.py").write_text(f"raise AssertionError('{name} is imported')")
    return {**os.environ, "PYTHONPATH": f"{tmp_path / 'path'}:{REPO}"}


@pytest.mark.slow
def test_the_command_runs_without_ray_and_torch(
    root: Store, text: Path, tmp_path: Path, light: dict[str, str]
) -> None:
    command = [sys.executable, str(REPO / "jobs" / "prepare.py"), "--storage", root.uri, "--no-ray"]
    base = ["--text", str(text), "--vocab-size", "400", "--sequence-len", "64"]
    sft = ["--stage", "sft", "--tasks", "identity:60"]
    for arguments in (base, sft):
        result = subprocess.run(
            [*command, *arguments], capture_output=True, text=True, timeout=100, env=light
        )
        assert result.returncode == 0, result.stderr
        assert " 1/1, " in result.stdout or " 2/2, " in result.stdout
        assert " s left" in result.stdout
    manifest = Manifest.load(root.child("datasets", "base"))
    options = {"text": [str(text)], "vocab_size": 400, "sequence_len": 64}
    assert prepare_base(root, "twin", **options).digest == manifest.digest
    assert Manifest.load(root.child("datasets", "sft")).kind == "sft"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--storage", "ftp://x"], "storage='ftp://x' is not allowed"),
        (["--stage", "sft", "--tokenizer", "base"], "tokenizer='base' is no dataset"),
        (["--stage", "sft", "--tasks", "chain_sum"], "tasks='chain_sum' is not allowed"),
    ],
)
def test_the_command_names_a_wrong_flag(tmp_path: Path, arguments: list[str], error: str) -> None:
    result = run_job("prepare", "--storage", str(tmp_path), *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert error in result.stderr
    assert "Traceback" not in result.stderr
