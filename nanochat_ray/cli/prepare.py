"""Prepare a dataset: text into shuffled rows of tokens, or tasks into rows of conversations.

nanochat-ray prepare --storage DIR --dataset base --text folder/ books/*.txt
nanochat-ray prepare --storage DIR --stage sft --dataset sft --tokenizer base
nanochat-ray prepare --storage DIR --stage sft --dataset sft --chats my.jsonl --tasks identity:500
ray job submit -- nanochat-ray prepare ...
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nanochat_ray.checks import check_int, check_name, require
from nanochat_ray.storage import Store, absolute, default_root
from nanochat_ray.tasks.conversations import parse_entry
from nanochat_ray.tasks.registry import DEFAULT_MIXTURE
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS

TaskCount = str
BASE_FLAGS = ("text", "text_column", "skip_bad", "vocab_size")
SFT_FLAGS = ("tasks", "chats")


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds datasets, tokenizers and runs."""
    stage: Literal["base", "sft"] = "base"
    dataset: str = ""
    """Name of the dataset; by default that of the stage."""
    text: tuple[str, ...] = ()
    """Files, folders, globs, s3:// or hf:// (.txt .md .html .json .jsonl .csv .tsv .parquet
    .arrow, source code; plain or .gz .bz2 .xz .zst .lz4); none is the documentation on this
    machine (base)."""
    text_column: str | None = None
    """Column or JSON field that has the text, by default "text" (base)."""
    skip_bad: bool = False
    """Leave out files, lines and rows that cannot be read, count and name them; without it the
    first is refused (base)."""
    vocab_size: int | None = None
    """Tokens of the tokenizer that is trained, by default 4096 (base)."""
    sequence_len: int | None = None
    """Tokens of a row; by default 512, or what the dataset has whose tokenizer is used."""
    seed: int = 0
    tokenizer: str | None = None
    """Dataset or run whose tokenizer is taken, or a tokenizer's fingerprint; by default a base
    dataset has a new one trained, and conversations take that of the dataset
    "base" (sft)."""
    tasks: tuple[TaskCount, ...] | None = None
    """Conversations, as task:count; by default a mixture, or none beside --chats (sft)."""
    chats: tuple[str, ...] = ()
    """Your own conversations: files, folders, globs or URIs of JSON lines in OpenAI's fine-tuning
    format or ShareGPT's. PATH:2000 samples or repeats so many, PATH:2.5x passes over them so often
    (sft)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        if self.dataset:
            check_name("dataset", self.dataset)
        if self.tokenizer is not None:
            check_name("tokenizer", self.tokenizer)
        other, flags = ("base", BASE_FLAGS) if self.stage == "sft" else ("sft", SFT_FLAGS)
        for name in flags:
            value, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            unset = value is None or value is False or value == ()
            require(unset, flag, value, f"only with --stage {other}")
        check_int("seed", self.seed, 0, 2**62)
        if self.sequence_len is not None:
            check_int("sequence_len", self.sequence_len, 8, 1 << 20)
        if self.vocab_size is not None:
            check_int("vocab_size", self.vocab_size, 256 + len(SPECIAL_TOKENS), 1 << 20)
        if self.stage == "base" and self.tokenizer is not None:
            allowed = "not with --tokenizer, which has its own"
            require(self.vocab_size is None, "--vocab-size", self.vocab_size, allowed)
        require(self.text_column != "", "text_column", "", "the name of a column")
        require(all(self.text), "text", self.text, "files, folders, globs or URIs")


MAX_CONVERSATIONS = 100_000_000


def mixture(tasks: tuple[str, ...]) -> list[tuple[str, int]]:
    found = []
    for task in tasks:
        name, mark, count = task.rpartition(":")
        if not mark or not count.isdecimal() or not 1 <= int(count[:12]) <= MAX_CONVERSATIONS:
            raise ValueError(
                f"tasks={task!r:.80} is not allowed: write task:count, for example gsm8k:5000, "
                f"with a count up to {MAX_CONVERSATIONS:,}"
            )
        found.append((name, int(count)))
    if not found:
        raise ValueError("tasks is empty: write task:count, for example gsm8k:5000")
    return found


def main(args: Args) -> None:
    from nanochat_ray.on_ray import session
    from nanochat_ray.on_ray.prepare import find_tokenizer, prepare_base, prepare_sft
    from nanochat_ray.on_ray.publish import check_replaceable

    name = args.dataset or args.stage
    root = Store.at(args.storage)
    check_replaceable(root, name, args.stage)  # before a Ray starts
    if args.stage == "base":
        chosen, length = find_tokenizer(root, args.tokenizer) if args.tokenizer else (None, None)
        session.connect()
        prepare_base(
            args.storage,
            name,
            text=args.text,
            vocab_size=args.vocab_size or 4096,
            sequence_len=args.sequence_len or length or 512,
            seed=args.seed,
            tokenizer=chosen,
            text_column=args.text_column or "text",
            skip_bad=args.skip_bad,
        )
        return
    chats = [parse_entry(entry) for entry in args.chats]
    tasks = (
        []
        if chats and args.tasks is None
        else mixture(DEFAULT_MIXTURE if args.tasks is None else args.tasks)
    )
    tokenizer, sequence_len = find_tokenizer(root, args.tokenizer or "base")
    session.connect()
    prepare_sft(
        args.storage,
        name,
        tokenizer=tokenizer,
        tasks=tasks,
        chats=chats,
        sequence_len=args.sequence_len or sequence_len or 512,
        seed=args.seed,
    )
