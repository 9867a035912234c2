"""Prepare a dataset: text or conversations into shuffled shards of packed token sequences.

    nanochat-ray prepare --dataset base --text folder/ books/*.txt
    nanochat-ray prepare --stage sft --dataset sft --tokenizer base
    nanochat-ray prepare --stage sft --dataset sft --chats my.jsonl --tasks identity:500
    nanochat-ray prepare --no-ray ...                 # in processes of this machine
    ray job submit -- nanochat-ray prepare ...

Equal flags and inputs make equal bytes, on any number of machines.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nanochat_ray.checks import check_int, check_name, require
from nanochat_ray.data.manifest import Manifest
from nanochat_ray.data.map_tasks import MapTasks, map_in_processes
from nanochat_ray.data.progress import log
from nanochat_ray.storage import Store, absolute, default_root
from nanochat_ray.tasks.conversations import Entry, parse_entry
from nanochat_ray.tasks.mixture import Mixture
from nanochat_ray.tasks.registry import DEFAULT_MIXTURE
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer

TaskCount = str
BASE_FLAGS = ("text", "text_column", "skip_bad", "vocab_size")
SFT_FLAGS = ("tasks", "chats")
DEPTH = 4
"""Depth of the model whose epochs over the dataset are printed: the default of training."""


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds datasets, tokenizers and runs."""
    stage: Literal["base", "sft"] = "base"
    """Text for pre-training, or conversations."""
    dataset: str = ""
    """Name of the dataset; by default that of the stage."""
    ray: bool = True
    """Run the tasks on Ray; --no-ray runs them in processes of this machine."""
    text: tuple[str, ...] = ()
    """Base: files, folders, globs, s3:// or hf://. Of the formats .txt .md .html .json .jsonl .csv
    .tsv .parquet .arrow and source code, plain or .gz .bz2 .xz .zst .lz4; by default the
    documentation on this machine."""
    text_column: str | None = None
    """Base: column or JSON field that has the text, by default "text"."""
    skip_bad: bool = False
    """Base: leave out, count and name files and lines that cannot be read. By default the first is
    an error."""
    vocab_size: int | None = None
    """Base: tokens of the tokenizer that is trained, by default 4096."""
    sequence_len: int | None = None
    """Tokens of a sequence; by default 512, or as the tokenizer's dataset."""
    seed: int = 0
    """Seed of the validation split and of the shuffle."""
    tokenizer: str | None = None
    """Dataset or run whose tokenizer is used, or its fingerprint. By default a base dataset trains
    a new one, and conversations use that of the dataset "base"."""
    tasks: tuple[TaskCount, ...] | None = None
    """SFT: conversations, as task:count; by default a mixture, none with --chats."""
    chats: tuple[str, ...] = ()
    """SFT: JSON lines in OpenAI's, ShareGPT's or Alpaca's format. Files, folders, globs
    or URIs; PATH:2000 samples or repeats that many conversations, PATH:2.5x is that many passes."""

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
            reason = "not with --tokenizer, which has its own"
            require(self.vocab_size is None, "--vocab-size", self.vocab_size, reason)
        require(self.text_column != "", "text_column", "", "the name of a column")
        require(all(self.text), "text", self.text, "files, folders, globs or URIs")


MAX_CONVERSATIONS = 100_000_000


def task_counts(tasks: tuple[str, ...]) -> list[tuple[str, int]]:
    """(task, count) of each ``task:count``. Raises ValueError."""
    counts = []
    for task in tasks:
        name, colon, count = task.rpartition(":")
        if not colon or not count.isdecimal() or not 1 <= int(count[:12]) <= MAX_CONVERSATIONS:
            raise ValueError(
                f"tasks={task!r:.80} is not allowed: write task:count, for example gsm8k:5000, "
                f"with a count up to {MAX_CONVERSATIONS:,}"
            )
        counts.append((name, int(count)))
    if not counts:
        raise ValueError("tasks is empty: write task:count, for example gsm8k:5000")
    return counts


def main(args: Args) -> None:
    from nanochat_ray.checkpoint.find_tokenizer import find_tokenizer
    from nanochat_ray.data.publish import check_replaceable

    name = args.dataset or args.stage
    root = Store.at(args.storage)
    check_replaceable(root, name, args.stage)  # before a Ray starts
    if args.stage == "base":
        tokenizer, length = find_tokenizer(root, args.tokenizer) if args.tokenizer else (None, None)
        base(args, name, tokenizer, args.sequence_len or length or 512)
    else:
        tasks, chats = conversations_of(args)
        sft_tokenizer, length = find_tokenizer(root, args.tokenizer or "base")
        mixture = Mixture.load(tasks, chats, args.seed)
        sft(args, name, mixture, sft_tokenizer, args.sequence_len or length or 512)


def connect(args: Args) -> MapTasks:
    """Where the tasks run: on Ray, or in processes of this machine."""
    if not args.ray:
        return map_in_processes
    from nanochat_ray.on_ray import session, tasks

    session.connect()
    return tasks.map_tasks


def base(args: Args, name: str, tokenizer: Tokenizer | None, sequence_len: int) -> None:
    from nanochat_ray.data.prepare import prepare_base

    manifest = prepare_base(
        args.storage,
        name,
        map_tasks=connect(args),
        text=args.text,
        vocab_size=args.vocab_size or 4096,
        sequence_len=sequence_len,
        seed=args.seed,
        tokenizer=tokenizer,
        text_column=args.text_column or "text",
        skip_bad=args.skip_bad,
    )
    log_epochs(manifest)


def conversations_of(args: Args) -> tuple[list[tuple[str, int]], list[Entry]]:
    """(tasks with counts, files of conversations); by default tasks only. Raises ValueError."""
    chats = [parse_entry(entry) for entry in args.chats]
    if chats and args.tasks is None:
        return [], chats
    return task_counts(DEFAULT_MIXTURE if args.tasks is None else args.tasks), chats


def sft(args: Args, name: str, mixture: Mixture, tokenizer: Tokenizer, sequence_len: int) -> None:
    from nanochat_ray.data.prepare import prepare_sft

    prepare_sft(
        args.storage,
        name,
        map_tasks=connect(args),
        mixture=mixture,
        tokenizer=tokenizer,
        sequence_len=sequence_len,
    )


def log_epochs(manifest: Manifest) -> None:
    """How many epochs the training of the smallest usual model takes."""
    from nanochat_ray.train import recipe

    tokens = manifest.num_sequences("train") * manifest.sequence_len
    vocab_size = manifest.about["vocab_size"]
    model = recipe.model_config(DEPTH, vocab_size, sequence_len=manifest.sequence_len)
    epochs = recipe.training_tokens(model) / tokens
    log(
        f"one epoch is {tokens / 1e6:,.2f} M tokens; training at --depth {DEPTH} to its full "
        f"length takes {epochs:,.1f} epochs"
    )
    if epochs > recipe.MANY_PASSES:
        log(
            f"WARNING: more than {recipe.MANY_PASSES} epochs teach little but to recite the text: "
            "prepare more text, or train on fewer tokens"
        )
