"""The prepare job: raw text or conversations in, shuffled Arrow shards and a manifest out.

Two passes. First Ray Data runs one task for each unit of input, which reads, tokenizes and packs
it and leaves its rows as a part file. Then one task for each shard gathers its rows from the
parts: the place of every row is a permutation that can be computed, so the shuffle is global,
the same on every run, and holds no more than one shard in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from nanochat_ray.data import corpus, documentation
from nanochat_ray.data.order import permute
from nanochat_ray.data.packing import pack, pack_whole
from nanochat_ray.data.shards import Manifest, RowReader, Shard, Split, token_dtype, write_shard
from nanochat_ray.storage import Store
from nanochat_ray.text.chat import render_conversation
from nanochat_ray.text.tokenizer import Tokenizer

FORMAT = "1"
"""Part of every key: a change of what is written makes old datasets stale."""
TOKENIZER_SAMPLE = 16_000_000
"""Characters the tokenizer is trained on, at most."""
SHARD_BYTES = 64 << 20
SPLITS: tuple[Split, ...] = ("train", "val")
Row = dict[str, Any]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _say(text: str) -> None:
    print(text, flush=True)


def _mapped(plan: Sequence[Any], work: Callable[[Any], Row], cores: int) -> Iterator[Row]:
    """``work`` of each item of ``plan`` as Ray Data tasks; results as they come."""

    def one(batch: Row) -> Row:
        found = work(json.loads(batch["item"][0]))
        return {name: np.asarray([value]) for name, value in found.items()}

    pool = ray.data.TaskPoolStrategy(size=min(cores, len(plan)))
    items = [{"item": json.dumps(item)} for item in plan]
    data = ray.data.from_items(items, override_num_blocks=len(items))
    try:
        yield from data.map_batches(one, batch_size=1, compute=pool).iter_rows()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from None
        raise


def _cores() -> int:
    # On a laptop Ray is told of more CPUs than there are; more tasks than cores only queue.
    nodes = max(1, sum(1 for node in ray.nodes() if node["Alive"]))
    total = int(ray.cluster_resources().get("CPU", 1))
    return max(1, min(total - 1, nodes * (os.cpu_count() or 1)))


# --- the default corpus -------------------------------------------------------------------------


def documentation_corpus(root: Store) -> str:
    """URI of the default corpus below ``root``, a folder that Ray Data fills if it is not there."""
    folder = f"documentation-{documentation.key()}"
    store = root.child("corpora", folder)
    if store.exists("done"):
        _say(f"corpus: {store.uri} (made before)")
        return store.uri
    began = time.perf_counter()
    files = [str(path) for path in documentation.files()]
    chunks = [files[at : at + 100] for at in range(0, len(files), 100)]

    def extract(item: list[Any]) -> Row:
        found = [documentation.docstrings(Path(path)) for path in item[1]]
        return {"at": item[0], "modules": json.dumps(found)}

    found: dict[int, list[list[str]]] = {}
    progress = _Progress(len(chunks), "read source files, group")
    for row in _mapped(list(enumerate(chunks)), extract, _cores()):
        found[int(row["at"])] = json.loads(row["modules"])
        progress.add(0)
    documents = documentation.documents(module for at in sorted(found) for module in found[at])
    size = sum(len(document) for document in documents)
    # Spread over files, so that units of work mix the packages.
    count = max(1, round(size / corpus.UNIT_BYTES))
    for number in range(count):
        table = pa.table({"text": documents[number::count]})
        with (
            store.writing(f"{number:02d}.arrow") as stream,
            pa.ipc.new_file(stream, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=256)
    store.write_text("done", "")
    _say(
        f"corpus: {len(documents):,} documents, {size / 1e6:.1f} MB from {len(files):,} files "
        f"in {time.perf_counter() - began:.0f} s; {store.uri}"
    )
    return store.uri


# --- parts and shards ---------------------------------------------------------------------------


def _shuffled(
    dataset: Store, parts: dict[Split, list[Shard]], manifest: Manifest, seed: int
) -> dict[str, list[Shard]]:
    """Writes the final shards from the parts; the order is a function of the parts and ``seed``."""
    rows_of = {split: sum(part.rows for part in parts[split]) for split in SPLITS}
    width = np.dtype(manifest.dtype).itemsize * (manifest.sequence_len + 1)
    per_shard = max(1, SHARD_BYTES // width)
    plan = [
        [split, at, min(at + per_shard, rows_of[split])]
        for split in SPLITS
        for at in range(0, rows_of[split], per_shard)
    ]
    uri = dataset.uri
    source = Manifest(**{**manifest.__dict__, "splits": dict(parts)}).to_json()

    def gather(item: list[Any]) -> Row:
        split, start, stop = item
        store = Store.at(uri)
        reader = RowReader(store.child("parts"), Manifest.from_json(source), split)
        places = np.arange(start, stop, dtype=np.int64)
        ids, mask = reader.rows(permute(places, len(reader), seed))
        # Named by its content's key: a reader of the old manifest still finds the old files.
        name = f"{manifest.key[:12]}-{split}-{start // per_shard:05d}.arrow"
        shard = write_shard(store, name, ids, mask)
        return {"split": split, "start": start, "shard": json.dumps(shard.__dict__)}

    found = list(_mapped(plan, gather, _cores()))
    found.sort(key=lambda row: int(row["start"]))
    return {
        split: [Shard(**json.loads(r["shard"])) for r in found if r["split"] == split]
        for split in SPLITS
    }


def _finish(
    dataset: Store, parts: dict[Split, list[Shard]], manifest: Manifest, seed: int
) -> Manifest:
    """Shuffles, publishes the manifest, and clears away parts and shards it does not name."""
    for split in SPLITS:
        if not parts[split]:
            raise ValueError(
                f"there is too little input: not one row of {manifest.sequence_len + 1} tokens "
                f"for the {split} split; give more, or a shorter sequence_len"
            )
    splits = _shuffled(dataset, parts, manifest, seed)
    done = Manifest(**{**manifest.__dict__, "splits": splits})
    dataset.write_text("manifest.json", done.to_json())
    named = {shard.name for shards in splits.values() for shard in shards} | {"manifest.json"}
    for name in dataset.list():
        if name not in named:
            dataset.delete(name)
    return done


def _unchanged(dataset: Store, key: str) -> Manifest | None:
    if not dataset.exists("manifest.json"):
        return None
    manifest = Manifest.load(dataset)
    if manifest.key != key:
        return None
    _say(f"dataset {dataset.uri} is up to date: {summary(manifest)}")
    return manifest


def summary(manifest: Manifest) -> str:
    a = manifest.about
    return (
        f"{manifest.rows('train'):,} rows to train on and {manifest.rows('val'):,} to validate, "
        f"{manifest.sequence_len:,} tokens each; {a['tokens'] / 1e6:.2f} M tokens from "
        f"{a['documents']:,} documents, {a['share_kept']:.2%} of them kept"
    )


class _Progress:
    def __init__(self, total: int, what: str):
        self.total, self.what = total, what
        self.began = self.shown = time.perf_counter()
        self.done = self.tokens = 0

    def add(self, tokens: int) -> None:
        self.done += 1
        self.tokens += tokens
        now = time.perf_counter()
        if now - self.shown > 2 or self.done == self.total:
            self.shown, spent = now, now - self.began
            left = spent / self.done * (self.total - self.done)
            rate = f": {self.tokens / 1e6:.2f} M tokens, {self.tokens / spent:,.0f} tokens/s"
            _say(
                f"  {self.what} {self.done}/{self.total}{rate if self.tokens else ''}, left {left:.0f} s"
            )


# --- base: text ---------------------------------------------------------------------------------


def _is_validation(document: str, share: float) -> bool:
    mark = hashlib.sha256(document.encode("utf-8", "replace")).digest()[:4]
    return int.from_bytes(mark, "big") < share * 2**32


def _sample(plan: Sequence[corpus.Unit], longest: int, share: float) -> Iterator[str]:
    """Documents to train the tokenizer on: from evenly spread units, none held out."""
    stride = max(1, len(plan) * corpus.UNIT_BYTES // (4 * TOKENIZER_SAMPLE))
    taken = 0
    for unit in plan[::stride]:
        for document in corpus.read(unit):
            for piece in corpus.cut(document, longest):
                if not _is_validation(piece, share):
                    taken += len(piece)
                    yield piece
        if taken > TOKENIZER_SAMPLE:
            return


def prepare_base(
    storage: str,
    name: str,
    *,
    text: Sequence[str] = (),
    vocab_size: int = 4096,
    sequence_len: int = 512,
    seed: int = 0,
) -> Manifest:
    """Prepares ``datasets/<name>`` from ``text`` (URIs; none is the default corpus).

    An unchanged input is not prepared twice. Raises ValueError for input that cannot be used.
    """
    root = Store.at(storage)
    dataset = root.child("datasets", name)
    sources = corpus.find(list(text) or [documentation_corpus(root)])
    size = sum(source.size for source in sources)
    identity = [[s.uri, s.size, s.modified if text else 0] for s in sources]
    key = _hash([FORMAT, "base", identity, vocab_size, sequence_len, seed])
    if (manifest := _unchanged(dataset, key)) is not None:
        return manifest
    # Long documents are cut so that some can be held out, however few there are.
    longest = min(max(size // 512, 2_000), 64_000)
    share = min(max(400_000 / size, 0.002), 0.05)
    plan = corpus.units(sources)
    _say(f"text: {len(sources):,} files, {size / 1e6:.1f} MB, in {len(plan):,} units")

    began = time.perf_counter()
    tokenizer = Tokenizer.train(_sample(plan, longest, share), vocab_size)
    tokenizer.save(root.child("tokenizers", tokenizer.fingerprint[:16]))
    _say(f"tokenizer: {tokenizer.vocab_size:,} tokens in {time.perf_counter() - began:.1f} s")

    dtype = token_dtype(tokenizer.vocab_size)
    uri, shared = dataset.uri, ray.put(tokenizer)

    def tokenize(item: list[Any]) -> Row:
        at, unit = item
        tok: Tokenizer = ray.get(shared)
        split: dict[Split, list[np.ndarray]] = {"train": [], "val": []}
        size = 0
        for document in corpus.read(tuple(corpus.Source(**source) for source in unit)):
            for piece in corpus.cut(document, longest):
                size += len(piece.encode("utf-8", "replace"))
                where: Split = "val" if _is_validation(piece, share) else "train"
                split[where].append(np.asarray(tok.encode(piece), dtype=dtype))
        found: Row = {"at": at, "bytes": size, "documents": sum(map(len, split.values()))}
        found["tokens"] = found["kept"] = 0
        for where, documents in split.items():
            packed = pack(documents, length=sequence_len + 1, bos=tok.bos, dtype=dtype)
            found["tokens"] += packed.tokens_in
            found["kept"] += packed.tokens_kept
            part = None
            if len(packed.rows):
                parts = Store.at(uri).child("parts")
                part = write_shard(parts, f"{where}-{at:06d}.arrow", packed.rows, None).__dict__
            found[where] = json.dumps(part)
        return found

    items = [[at, [source.__dict__ for source in unit]] for at, unit in enumerate(plan)]
    progress = _Progress(len(items), "tokenized")
    rows = []
    for row in _mapped(items, tokenize, _cores()):
        rows.append(row)
        progress.add(int(row["tokens"]))
    rows.sort(key=lambda row: int(row["at"]))
    tokens, kept = (sum(int(row[k]) for row in rows) for k in ("tokens", "kept"))
    seconds = time.perf_counter() - began
    manifest = Manifest(
        kind="base",
        tokenizer=tokenizer.fingerprint,
        sequence_len=sequence_len,
        dtype=str(dtype),
        splits={},
        key=key,
        about={
            "documents": sum(int(row["documents"]) for row in rows),
            "bytes": sum(int(row["bytes"]) for row in rows),
            "tokens": tokens,
            "share_kept": kept / max(tokens, 1),
            "vocab_size": tokenizer.vocab_size,
            "seed": seed,
            "tokens_per_s": tokens / seconds,
        },
    )
    done = _finish(dataset, _parts(rows), manifest, seed)
    _say(f"dataset {dataset.uri}: {summary(done)}; {time.perf_counter() - began:.0f} s")
    return done


def _parts(rows: Sequence[Row]) -> dict[Split, list[Shard]]:
    found: dict[Split, list[Shard]] = {}
    for split in SPLITS:
        made = [json.loads(row[split]) for row in rows]
        found[split] = [Shard(**part) for part in made if part is not None]
    return found


# --- sft: conversations -------------------------------------------------------------------------


def prepare_sft(
    storage: str,
    name: str,
    *,
    tokenizer: Tokenizer,
    tasks: Sequence[tuple[str, int]],
    sequence_len: int = 512,
    seed: int = 0,
) -> Manifest:
    """Prepares ``datasets/<name>`` from tasks, given as (name, number of conversations)."""
    from nanochat_ray.tasks.registry import make_task

    root = Store.at(storage)
    dataset = root.child("datasets", name)
    key = _hash([FORMAT, "sft", list(tasks), tokenizer.fingerprint, sequence_len, seed])
    if (manifest := _unchanged(dataset, key)) is not None:
        return manifest
    chunk = 2048
    plan: list[list[Any]] = []
    for task, count in tasks:
        sizes: dict[Split, int] = {"train": count, "val": max(8, min(200, count // 20))}
        for split, size in sizes.items():
            size = len(make_task(task, split, size=size, seed=seed))
            plan += [
                [len(plan) + i, task, split, size, at] for i, at in enumerate(range(0, size, chunk))
            ]
    dtype = token_dtype(tokenizer.vocab_size)
    uri, shared = dataset.uri, ray.put(tokenizer)
    root.child("tokenizers", tokenizer.fingerprint[:16]).exists("tokenizer.json")

    def render(item: list[Any]) -> Row:
        at, task, split, size, first = item
        tok: Tokenizer = ray.get(shared)
        made = make_task(task, split, size=size, seed=seed)
        numbers = range(first, min(first + chunk, size))
        rendered = [render_conversation(tok, made.example(i)) for i in numbers]
        packed = pack_whole(rendered, length=sequence_len + 1, bos=tok.bos, dtype=dtype)
        part = None
        if len(packed.ids):
            parts = Store.at(uri).child("parts")
            part = write_shard(parts, f"{split}-{at:06d}.arrow", packed.ids, packed.mask).__dict__
        found: Row = {name: json.dumps(None) for name in SPLITS}
        return {
            **found,
            split: json.dumps(part),
            "at": at,
            "documents": len(rendered),
            "dropped": packed.dropped,
            "tokens": sum(len(ids) for ids, _ in rendered),
            "kept": sum(len(ids) for ids, _ in rendered if len(ids) <= sequence_len + 1),
        }

    began = time.perf_counter()
    progress = _Progress(len(plan), "rendered")
    rows = []
    for row in _mapped(plan, render, _cores()):
        rows.append(row)
        progress.add(int(row["tokens"]))
    rows.sort(key=lambda row: int(row["at"]))
    dropped = sum(int(row["dropped"]) for row in rows)
    if dropped:
        _say(f"  {dropped:,} conversations were longer than {sequence_len + 1} tokens: dropped")
    tokens, kept = (sum(int(row[k]) for row in rows) for k in ("tokens", "kept"))
    manifest = Manifest(
        kind="sft",
        tokenizer=tokenizer.fingerprint,
        sequence_len=sequence_len,
        dtype=str(dtype),
        splits={},
        key=key,
        about={
            "documents": sum(int(row["documents"]) for row in rows),
            "tokens": tokens,
            "share_kept": kept / max(tokens, 1),
            "tasks": [list(task) for task in tasks],
            "dropped": dropped,
            "seed": seed,
        },
    )
    done = _finish(dataset, _parts(rows), manifest, seed)
    _say(f"dataset {dataset.uri}: {summary(done)}; {time.perf_counter() - began:.0f} s")
    return done
