"""``nanochat-ray prepare``: from its flags to the call that prepares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_ray.cli import prepare
from nanochat_ray.cli.prepare import Args, conversations_of, task_counts
from nanochat_ray.data import prepare as preparation
from nanochat_ray.data.map_tasks import map_in_processes
from nanochat_ray.storage import Store
from nanochat_ray.tasks.conversations import Entry
from nanochat_ray.tasks.registry import DEFAULT_MIXTURE
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS
from nanochat_ray.train import recipe
from tests.tiny import TOKENIZER, write_dataset


def test_tasks_have_a_count() -> None:
    assert task_counts(("a:1", "b,x=2:3:100000000")) == [("a", 1), ("b,x=2:3", 100_000_000)]
    for wrong in ("a", "a:", "a:0", "a:-1", "a:1.5", "a:100000001", ""):
        with pytest.raises(ValueError, match="write task:count"):
            task_counts((wrong,))
    with pytest.raises(ValueError, match="tasks is empty"):
        task_counts(())


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("seed", 0, 2**62),
        ("sequence_len", 8, 1 << 20),
        ("vocab_size", 256 + len(SPECIAL_TOKENS), 1 << 20),
    ],
)
def test_numbers_to_their_bounds(name: str, least: int, most: int) -> None:
    for value in (least, most):
        assert getattr(Args(**{name: value}), name) == value  # type: ignore[arg-type]
    for value in (least - 1, most + 1):
        with pytest.raises(ValueError, match=f"{name}={value} is not allowed"):
            Args(**{name: value})  # type: ignore[arg-type]


def test_chats_replace_the_mixture() -> None:
    sft: dict[str, Any] = {"stage": "sft"}
    default = task_counts(DEFAULT_MIXTURE)
    chats = [Entry("my.jsonl", count=20)]
    assert conversations_of(Args(**sft)) == (default, [])
    assert conversations_of(Args(**sft, chats=("my.jsonl:20",))) == ([], chats)
    both = Args(**sft, chats=("my.jsonl:20",), tasks=("a:2",))
    assert conversations_of(both) == ([("a", 2)], chats)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of each preparation, which does nothing."""
    result: list[dict[str, Any]] = []

    def record(storage: str, name: str, **options: Any) -> None:
        result.append({"storage": storage, "name": name, **options})

    for name in ("prepare_base", "prepare_sft"):
        monkeypatch.setattr(preparation, name, record)
    monkeypatch.setattr(prepare, "log_epochs", lambda manifest: None)
    return result


def test_flags_of_a_base_dataset(root: Store, calls: list[dict[str, Any]]) -> None:
    prepare.main(Args(storage=root.uri, ray=False))
    flags: dict[str, Any] = {"vocab_size": 300, "sequence_len": 64, "seed": 5, "skip_bad": True}
    other = {"dataset": "mine", "text": ("a", "b"), "text_column": "body"}
    prepare.main(Args(storage=root.uri, ray=False, **flags, **other))
    write_dataset(root, "old", length=48)
    prepare.main(Args(storage=root.uri, ray=False, tokenizer="old"))
    default = {"map_tasks": map_in_processes, "text": (), "vocab_size": 4096, "sequence_len": 512}
    default |= {"storage": root.uri, "name": "base", "seed": 0, "tokenizer": None}
    default |= {"text_column": "text", "skip_bad": False}
    tokenizer = calls[2].pop("tokenizer")
    assert calls == [
        default,
        {**default, **flags, "name": "mine", "text": ("a", "b"), "text_column": "body"},
        {**{k: v for k, v in default.items() if k != "tokenizer"}, "sequence_len": 48},
    ]
    assert tokenizer.fingerprint == TOKENIZER.fingerprint


def test_conversations_use_the_base_tokenizer(root: Store, calls: list[dict[str, Any]]) -> None:
    write_dataset(root, "base", length=48)
    write_dataset(root, "other", length=40)
    sft: dict[str, Any] = {
        "storage": root.uri,
        "ray": False,
        "stage": "sft",
        "tasks": ("limits:3",),
    }
    prepare.main(Args(**sft))
    prepare.main(Args(**sft, tokenizer="other", dataset="mine"))
    prepare.main(Args(**sft, sequence_len=64))
    assert [(call["name"], call["sequence_len"]) for call in calls] == [
        ("sft", 48),
        ("mine", 40),
        ("sft", 64),
    ]
    for call in calls:
        assert call["tokenizer"].fingerprint == TOKENIZER.fingerprint
        assert call["mixture"].tasks == (("limits", 3),)


@pytest.mark.parametrize("epochs", [15.9, 16.1])
def test_many_epochs_are_warned_of(capsys: pytest.CaptureFixture[str], epochs: float) -> None:
    """More than 16 are."""
    length, vocab_size = 512, 4096
    model = recipe.model_config(4, vocab_size, sequence_len=length)
    num_sequences = round(recipe.training_tokens(model) / length / epochs)
    manifest: Any = SimpleNamespace(
        num_sequences=lambda split: {"train": num_sequences}[split],
        sequence_len=length,
        about={"vocab_size": vocab_size},
    )
    prepare.log_epochs(manifest)
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith(f"one epoch is {num_sequences * length / 1e6:,.2f} M tokens;")
    assert f"takes {epochs:,.1f} epochs" in first
    assert bool(others) == (epochs > 16)
