"""Prepare a dataset: text into shuffled rows of tokens, or tasks into rows of conversations.

python jobs/prepare.py --storage DIR --dataset base --text folder/ books/*.txt
python jobs/prepare.py --storage DIR --stage sft --dataset sft --tokenizer base
ray job submit -- python jobs/prepare.py ...
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

import tyro

from nanochat_ray.storage import Store, default_root
from nanochat_ray.tasks.registry import DEFAULT_MIXTURE

TaskCount = str


@dataclass(frozen=True, kw_only=True)
class Args:
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds datasets, tokenizers and runs."""
    stage: Literal["base", "sft"] = "base"
    dataset: str = ""
    """Name of the dataset; by default that of the stage."""
    text: tuple[str, ...] = ()
    """Files, folders, globs, s3:// or hf:// (.txt .md .jsonl .parquet .arrow, plain or
    compressed); none is the documentation on this machine (base)."""
    vocab_size: int = 4096
    """Tokens of the tokenizer that is trained (base)."""
    sequence_len: int | None = None
    """Tokens of a row; by default 512, or what the dataset has whose tokenizer is used."""
    seed: int = 0
    tokenizer: str = "base"
    """Dataset whose tokenizer the conversations take, or a tokenizer's fingerprint (sft)."""
    tasks: tuple[TaskCount, ...] = DEFAULT_MIXTURE
    """Conversations, as task:count (sft)."""


def mixture(tasks: tuple[str, ...]) -> list[tuple[str, int]]:
    found = []
    for task in tasks:
        name, mark, count = task.rpartition(":")
        if not mark or not count.isdecimal() or int(count) < 1:
            raise ValueError(
                f"tasks={task!r} is not allowed: write task:count, for example gsm8k:5000"
            )
        found.append((name, int(count)))
    if not found:
        raise ValueError("tasks is empty: write task:count, for example gsm8k:5000")
    return found


def main(args: Args) -> None:
    from nanochat_ray.on_ray import session
    from nanochat_ray.on_ray.prepare import find_tokenizer, prepare_base, prepare_sft

    name = args.dataset or args.stage
    root = Store.at(args.storage)
    if args.stage == "base":
        session.connect()
        prepare_base(
            args.storage,
            name,
            text=args.text,
            vocab_size=args.vocab_size,
            sequence_len=args.sequence_len or 512,
            seed=args.seed,
        )
        return
    tasks = mixture(args.tasks)
    tokenizer, sequence_len = find_tokenizer(root, args.tokenizer)
    session.connect()
    prepare_sft(
        args.storage,
        name,
        tokenizer=tokenizer,
        tasks=tasks,
        sequence_len=args.sequence_len or sequence_len or 512,
        seed=args.seed,
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
