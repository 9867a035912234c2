"""Measure what grows with the text or with the ranks, where no such cluster is at hand.

    nanochat-ray bench scale --text-gb 1000 --ranks 1024

Runs the driver's own code of each stage with tasks that do no work: it makes the plan of a text
that is not there, merges results as such tasks would give, and builds the optimizer's buffers of
one rank without memory. Prints seconds and memory of the driver (or of one rank), what crosses the
network, and in how many requests. The last line is one JSON object.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import pickle
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from nanochat_ray.bench.environment import machine
from nanochat_ray.checks import check_float, check_int
from nanochat_ray.data import sources, tokenize_text
from nanochat_ray.data.manifest import Manifest, Shard
from nanochat_ray.data.map_tasks import TaskResult, Work
from nanochat_ray.data.order import global_batch_indices
from nanochat_ray.data.prepare import BYTES_PER_TOKEN
from nanochat_ray.data.publish import num_shards_for
from nanochat_ray.data.shards import SequenceReader, token_dtype
from nanochat_ray.data.sources import Source
from nanochat_ray.data.split import SplitRule
from nanochat_ray.data.tokenize_text import TokenizeUnit, census_stride
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim import flat
from nanochat_ray.optim.groups import build_groups
from nanochat_ray.storage import Store
from nanochat_ray.train import recipe

DOCUMENT_BYTES = 4000


@dataclass(frozen=True, kw_only=True)
class Args:
    text_gb: float = 1000.0
    """Text, in 10^9 bytes."""
    file_mb: float = 100.0
    """Size of a file of it (compressed, a third of its text)."""
    sequence_len: int = 2048
    vocab_size: int = 32768
    ranks: int = 1024
    depth: int = 20

    def __post_init__(self) -> None:
        for name in ("sequence_len", "vocab_size", "ranks", "depth"):
            check_int(name, getattr(self, name), 1)
        for name in ("text_gb", "file_mb"):
            check_float(name, getattr(self, name), above=True)

    @property
    def num_tokens(self) -> int:
        return int(self.text_gb * 1e9 / BYTES_PER_TOKEN)

    @property
    def sequence_bytes(self) -> int:
        return token_dtype(self.vocab_size).itemsize * (self.sequence_len + 1)


@dataclass(frozen=True)
class Figures:
    """Of one stage: the time and the largest memory of the process that it is about."""

    stage: str
    seconds: float
    peak_mb: float
    counts: dict[str, float]

    def line(self) -> str:
        counts = ", ".join(f"{value:,.6g} {name}" for name, value in self.counts.items())
        return f"{self.stage:<34} {self.seconds:8.3f} s {self.peak_mb:9.1f} MB   {counts}"


def _measure(stage: str, work: Callable[[], dict[str, float]]) -> Figures:
    """Runs ``work`` twice: for its time, and for its memory, which costs time to trace."""
    start = time.perf_counter()
    counts = work()
    seconds = time.perf_counter() - start
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return Figures(stage, seconds, peak / 1e6, counts)


# --- prepare ------------------------------------------------------------------------------------


def files(args: Args) -> list[Source]:
    size = int(args.file_mb * 1e6)
    count = max(1, round(args.text_gb * 1e9 / (3 * size)))
    uri = "s3://bucket/text/{:06d}.jsonl.gz"
    return [Source(uri=uri.format(n), size=size, mtime_ns=n) for n in range(count)]


def plan(args: Args) -> dict[str, float]:
    text = files(args)
    return {"files": len(text), "units": len(sources.units(text))}


def _result(number: int, num_documents: int, stride: int) -> TaskResult:
    """As ``TokenizeUnit`` gives it for a unit of documents that all differ."""
    hashes = np.random.default_rng(number).integers(0, 2**64, num_documents, np.uint64)
    hashes = hashes[hashes % np.uint64(stride) == 0]
    sizes = np.full(len(hashes), DOCUMENT_BYTES, np.uint32)
    num_tokens = int(num_documents * DOCUMENT_BYTES / BYTES_PER_TOKEN)
    return {
        "number": number,
        "documents": num_documents,
        "bytes": num_documents * DOCUMENT_BYTES,
        "tokens": num_tokens,
        "packed_tokens": num_tokens,
        "train": f"train-{number:06d}",
        "val": f"val-{number:06d}",
        "hashes": base64.b64encode(hashes.tobytes()).decode(),
        "sizes": base64.b64encode(sizes.tobytes()).decode(),
        "unreadable": {"count": 0, "first": []},
    }


def first_pass(args: Args, units: Sequence[sources.Unit]) -> dict[str, float]:
    """The driver's part: items to tasks, results from them, the census of duplicates. The time to
    make the results up is in it."""
    size = int(args.text_gb * 1e9)
    rule = SplitRule.for_text(size, args.sequence_len)
    stride = census_stride(size)
    num_documents = max(1, size // len(units) // DOCUMENT_BYTES)
    num_bytes = 0

    def map_tasks(items: Sequence[Any], work: Work, /) -> Iterator[TaskResult]:
        nonlocal num_bytes
        num_bytes = sum(len(json.dumps(item)) for item in items)
        for number in range(len(items)):
            text = json.dumps(_result(number, num_documents, stride))
            num_bytes += len(text)
            yield json.loads(text)

    work = cast(TokenizeUnit, SimpleNamespace(stride=stride))  # all that the driver reads of it
    with contextlib.redirect_stdout(io.StringIO()):
        text = tokenize_text.tokenize_text(map_tasks, units, work)
        rule.adjust(text.census, 16 * args.sequence_len // stride)
    return {"tasks": len(units), "bytes to and from the driver": num_bytes}


def second_pass(args: Args, units: Sequence[sources.Unit]) -> dict[str, float]:
    """What the tasks of the second pass read beside the sequences themselves."""
    shards = num_shards_for(args.num_tokens * token_dtype(args.vocab_size).itemsize)
    parts = {"train": [f"train-{n:06d}" for n in range(len(units))]}
    reads = 2 * len(units) * shards
    return {
        "tasks": shards,
        "reads": reads,
        "bytes of a read": args.num_tokens / args.sequence_len * args.sequence_bytes * 2 / reads,
        "bytes of offsets": 16 * len(units) * shards,
        "bytes of a task's plan": len(pickle.dumps(parts)),
    }


# --- train --------------------------------------------------------------------------------------


def manifest(args: Args) -> Manifest:
    count = num_shards_for(args.num_tokens * token_dtype(args.vocab_size).itemsize)
    rows = max(1, args.num_tokens // args.sequence_len // count)
    size = rows * args.sequence_bytes
    shards = [
        Shard(
            name=f"{'0' * 12}-train-{n:05d}.arrow", num_sequences=rows, size=size, sha256="0" * 64
        )
        for n in range(count)
    ]
    return Manifest(
        kind="base",
        tokenizer="0" * 64,
        sequence_len=args.sequence_len,
        dtype=str(token_dtype(args.vocab_size)),
        splits={"train": shards, "val": shards[:1]},
        key="0" * 64,
    )


def data_order(args: Args, dataset: Manifest) -> dict[str, float]:
    """What each rank does to learn which sequences a step of the second epoch has."""
    text = dataset.to_json()
    reader = SequenceReader(Store.at("/nowhere"), Manifest.from_json(text), "train")
    batch = recipe.batch_tokens(args.num_tokens) // args.sequence_len
    start = time.perf_counter()
    global_batch_indices(len(reader), 0, batch, len(reader) // batch + 1)
    return {
        "sequences": len(reader),
        "bytes of the manifest": len(text),
        "sequences of a step": batch,
        "ms to order a step": 1e3 * (time.perf_counter() - start),
    }


def optimizer(args: Args) -> dict[str, float]:
    """The buffers of rank 0, on the meta device."""
    config = recipe.model_config(
        args.depth, vocab_size=args.vocab_size, sequence_len=args.sequence_len
    )
    with torch.device("meta"):
        model = GPT(config)
        parameters = dict(model.named_parameters())
        groups = build_groups(parameters.items(), recipe.optim_config(config, 1, 1))
        flats = [flat.FlatGroup(group, parameters, 0, args.ranks) for group in groups]
    num_parameters = sum(parameter.numel() for parameter in parameters.values())
    state = sum(share.numel() for each in flats for share in each.state.values())
    return {
        "parameters": num_parameters,
        "times as large with padding": sum(f.weights.numel() for f in flats) / num_parameters,
        "reductions of a step": sum(len(each.buckets()) for each in flats),
        "bytes of state on a rank": 4 * state,
        "bytes of a checkpoint, read once": 4 * 3 * num_parameters,
    }


def measure(args: Args) -> list[Figures]:
    units, dataset = sources.units(files(args)), manifest(args)
    return [
        _measure("prepare: plan", lambda: plan(args)),
        _measure("prepare: first pass, driver", lambda: first_pass(args, units)),
        _measure("prepare: second pass", lambda: second_pass(args, units)),
        _measure("train: data order, each rank", lambda: data_order(args, dataset)),
        _measure("train: optimizer, each rank", lambda: optimizer(args)),
    ]


def main(args: Args) -> None:
    print(f"{machine()}; {args.text_gb:g} GB of text, {args.ranks:,} ranks")
    figures = measure(args)
    for each in figures:
        print(each.line())
    print(
        json.dumps({"machine": machine(), "args": asdict(args), "stages": [*map(asdict, figures)]})
    )
