"""The first pass over text: read, split, tokenize, pack, scatter; one task for each unit."""

from __future__ import annotations

import base64
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nanochat_ray.data import corpus
from nanochat_ray.data.manifest import SPLITS
from nanochat_ray.data.map_tasks import MapTasks, TaskResult
from nanochat_ray.data.packing import pack_documents
from nanochat_ray.data.progress import run_with_progress
from nanochat_ray.data.publish import ShardWriter
from nanochat_ray.data.shards import token_dtype
from nanochat_ray.data.sources import ReadOptions, Source, Unit, Unreadable
from nanochat_ray.data.split import Census, SplitRule
from nanochat_ray.text.tokenizer import Tokenizer

CENSUS_TEXT_BYTES = 4 << 30
"""Of more text than this, duplicates are counted in a sample of the different chunks."""


def census_stride(size: int) -> int:
    """The census of ``size`` bytes of text counts one in this many different chunks."""
    return max(1, size // CENSUS_TEXT_BYTES)


@dataclass(frozen=True, kw_only=True)
class TokenizeUnit:
    """Work of one task."""

    tokenizer: Tokenizer
    rule: SplitRule
    options: ReadOptions
    sequence_len: int
    out: ShardWriter
    stride: int
    """Of the census."""

    def __call__(self, item: Any) -> TaskResult:
        number, unit = item
        tokenizer, dtype = self.tokenizer, token_dtype(self.tokenizer.vocab_size)
        unreadable = Unreadable()
        sources = tuple(Source(**source) for source in unit)
        chunks = self.rule.split(corpus.read(sources, self.options, unreadable))
        result: TaskResult = {"number": number, "documents": 0, "bytes": 0, "tokens": 0}
        result["packed_tokens"] = 0
        for split, texts in zip(SPLITS, (chunks.train, chunks.val), strict=True):
            documents = [np.asarray(tokenizer.encode(text), dtype=dtype) for text in texts]
            sequences = pack_documents(
                documents, length=self.sequence_len + 1, bos=tokenizer.bos, dtype=dtype
            )
            result["documents"] += len(texts)
            result["bytes"] += sum(len(text.encode()) for text in texts)
            result["tokens"] += sequences.num_input_tokens
            result["packed_tokens"] += sequences.num_packed_tokens
            result[split] = self.out.write(split, number, sequences.ids, None)
        census = chunks.census.sample(self.stride)
        result["hashes"] = base64.b64encode(census.hashes.tobytes()).decode()
        result["sizes"] = base64.b64encode(census.sizes.astype(np.uint32).tobytes()).decode()
        result["unreadable"] = asdict(unreadable)
        return result


@dataclass(frozen=True)
class TokenizedText:
    """The results of all tasks."""

    results: list[TaskResult]
    """Of each task, with its shuffle parts by split."""
    about: dict[str, Any]
    """Statistics for the manifest."""
    census: Census
    unreadable: Unreadable


def tokenize_text(map_tasks: MapTasks, plan: Sequence[Unit], work: TokenizeUnit) -> TokenizedText:
    """Runs ``work`` on every unit of ``plan``."""
    items = [[number, [asdict(source) for source in unit]] for number, unit in enumerate(plan)]
    start = time.perf_counter()
    results = run_with_progress(map_tasks, items, work, "tokenized")
    seconds = time.perf_counter() - start
    unreadable, censuses = Unreadable(), []
    for result in results:
        unreadable.merge(Unreadable(**result["unreadable"]))
        hashes = np.frombuffer(base64.b64decode(result["hashes"]), np.uint64)
        sizes = np.frombuffer(base64.b64decode(result["sizes"]), np.uint32)
        censuses.append(Census(hashes, sizes.astype(np.int64)))
    census = Census.concat(censuses)
    copies, duplicate_share = census.duplicates()
    totals = {
        name: sum(result[name] for result in results)
        for name in ("documents", "bytes", "tokens", "packed_tokens")
    }
    about = {
        "documents": totals["documents"],
        "bytes": totals["bytes"],
        "tokens": totals["tokens"],
        "share_kept": totals["packed_tokens"] / max(totals["tokens"], 1),
        "tokens_per_s": round(totals["tokens"] / seconds),
        "duplicates": copies * work.stride,
        "duplicate_share": duplicate_share,
    }
    return TokenizedText(results, about, census, unreadable)
