"""The first pass over conversations: render, pack, scatter; each task has a share of all sources.

Were the sequences of one task of one source only, a model could learn to copy from the earlier
conversations of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from nanochat_ray.data.manifest import SPLITS
from nanochat_ray.data.map_tasks import MapTasks, TaskResult
from nanochat_ray.data.order import derive_key, permute
from nanochat_ray.data.packing import pack_conversations
from nanochat_ray.data.progress import run_with_progress
from nanochat_ray.data.publish import ShardWriter
from nanochat_ray.data.shards import Split, token_dtype
from nanochat_ray.text.chat import Message, render_conversation
from nanochat_ray.text.tokenizer import Tokenizer

CONVERSATIONS_PER_TASK = 2048


class Mixture(Protocol):
    """Sources of conversations by name; ``tasks/mixture.py`` has the implementation.

    It can be pickled, and equal arguments give equal conversations in every process.
    """

    @property
    def seed(self) -> int: ...

    def identity(self) -> tuple[list[tuple[str, int]], list[str]]:
        """JSON values of which the conversations are a function, beside ``seed``: (name, count)
        of each task, and digests of the conversations that files hold."""
        ...

    def counts(self) -> list[tuple[str, int]]:
        """(source, conversations to train on)."""
        ...

    def sizes(self, split: Split) -> list[tuple[str, int]]:
        """(source, conversations in this split)."""
        ...

    def conversations(
        self, source: str, split: Split, size: int, start: int, stop: int
    ) -> list[list[Message]]:
        """Conversations ``start`` to ``stop`` of the ``size`` of a source."""
        ...


@dataclass(frozen=True, kw_only=True)
class RenderConversations:
    """Work of one task."""

    tokenizer: Tokenizer
    mixture: Mixture
    sequence_len: int
    out: ShardWriter

    def __call__(self, item: Any) -> TaskResult:
        number, split, slices = item
        tokenizer, length = self.tokenizer, self.sequence_len + 1
        pairs: list[tuple[list[int], list[int]]] = []
        for source, size, start, stop in slices:
            messages = self.mixture.conversations(source, split, size, start, stop)
            pairs += [_render(tokenizer, source, split, *one) for one in enumerate(messages, start)]
        order = np.arange(len(pairs), dtype=np.int64)
        key = derive_key(self.mixture.seed, SPLITS.index(split), number)
        order = permute(order, len(order), key)
        conversations = [pairs[i] for i in order]
        sequences = pack_conversations(
            conversations,
            length=length,
            bos=tokenizer.bos,
            dtype=token_dtype(tokenizer.vocab_size),
        )
        lengths = [len(ids) for ids, _ in conversations]
        return {
            "number": number,
            **dict.fromkeys(SPLITS, ""),
            split: self.out.write(split, number, sequences.ids, sequences.mask),
            "documents": len(conversations),
            "too_long": sequences.num_too_long,
            "tokens": sum(lengths),
            "packed_tokens": sum(size for size in lengths if size <= length),
            "sequence_tokens": sequences.ids.size,
            "loss_tokens": int(sequences.mask.sum()),
        }


def _render(
    tokenizer: Tokenizer, source: str, split: Split, index: int, messages: list[Message]
) -> tuple[list[int], list[int]]:
    """As ``render_conversation``. ValueError, with source and index, for what is no conversation
    and for one in which the assistant says nothing: there is nothing to learn."""
    where = f"{source}, conversation {index} of the split {split}"
    try:
        ids, mask = render_conversation(tokenizer, messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not any(mask):
        raise ValueError(f"{where}: no message of the assistant's has a loss: nothing to learn")
    return ids, mask


def plan_tasks(mixture: Mixture) -> list[list[Any]]:
    """Items [number, split, slices]; a slice is [source, its size, start, stop]."""
    plan: list[list[Any]] = []
    for split in SPLITS:
        sizes = mixture.sizes(split)
        count = -(-sum(size for _, size in sizes) // CONVERSATIONS_PER_TASK)
        for i in range(count):
            slices = [[s, n, n * i // count, n * (i + 1) // count] for s, n in sizes]
            plan.append([len(plan), split, slices])
    return plan


def render_conversations(
    map_tasks: MapTasks, plan: Sequence[Any], work: RenderConversations
) -> tuple[list[TaskResult], dict[str, Any]]:
    """(results of all tasks, statistics for the manifest)."""
    results = run_with_progress(map_tasks, plan, work, "rendered")
    names = ("documents", "too_long", "tokens", "packed_tokens", "sequence_tokens", "loss_tokens")
    totals = {name: sum(result[name] for result in results) for name in names}
    share_packed = totals["packed_tokens"] / max(totals["tokens"], 1)
    about = {
        "documents": totals["documents"],
        "dropped": totals["too_long"],
        "tokens": totals["tokens"],
        "learned": totals["loss_tokens"],
        "share_kept": share_packed,
        "share_filled": share_packed * totals["tokens"] / max(totals["sequence_tokens"], 1),
    }
    return results, about
