"""The prepare job: raw text or conversations in, shuffled Arrow shards and a manifest out.

Two passes of Ray Data. In the first, each task reads, tokenizes and packs one unit of input and
scatters its rows over the shards, as one part file. In the second, each task gathers one shard
from all parts. Both hold no more than one unit or one shard in memory, and the result depends on
the input, the parameters and the seed alone.
"""

from __future__ import annotations

import base64
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Concatenate, ParamSpec

import numpy as np
import ray

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checks import check_name
from nanochat_ray.claim import claimed
from nanochat_ray.data import corpus, documentation, sample, sources
from nanochat_ray.data.holdout import Census, HoldOut
from nanochat_ray.data.order import derive_key, permute
from nanochat_ray.data.packing import pack_conversations, pack_documents
from nanochat_ray.data.shards import Manifest, Split, token_dtype
from nanochat_ray.data.shuffle import scatter
from nanochat_ray.data.sources import ReadOptions, Skipped
from nanochat_ray.on_ray.documentation import documentation_corpus
from nanochat_ray.on_ray.mapping import Progress, Row, mapped, say
from nanochat_ray.on_ray.publish import (
    SPLITS,
    check_replaceable,
    key_of,
    publish,
    shards_for,
    summary,
    unchanged,
)
from nanochat_ray.storage import Store
from nanochat_ray.tasks import conversations
from nanochat_ray.tasks.conversations import Conversations, Entry
from nanochat_ray.tasks.registry import make_task
from nanochat_ray.text.chat import Message, render_conversation
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from nanochat_ray.train import recipe

DEPTH = 4
"""Of the model for which passes over the data are told: the default of training."""
CENSUS_BYTES = 8 << 20
"""Text up to this size is counted before it is divided; of more, what is held out is checked when
it is tokenized."""
COUNTED_BYTES = 4 << 30
"""Of more text than this, duplicates are counted in a sample of the different documents."""
P = ParamSpec("P")
CONVERSATIONS_PER_TASK = 2048
_BY_INPUT = "by-input"
"""Folder beside the tokenizers: which one was trained on what input."""


@dataclass(frozen=True)
class ShardWriter:
    """Where the tasks of the first pass leave their rows."""

    uri: str
    shards: int
    seed: int

    def write(self, split: Split, number: int, ids: np.ndarray, mask: np.ndarray | None) -> str:
        """The part file's name; empty if there are no rows."""
        if not len(ids):
            return ""
        name = f"{split}-{number:06d}.arrow"
        shards = self.shards if split == "train" else 1
        key = derive_key(self.seed, SPLITS.index(split), number)
        scatter(Store.at(self.uri).child("parts"), name, ids, mask, shards, key)
        return name


def _first_pass(plan: Sequence[Any], work: Callable[[Any], Row], what: str) -> list[Row]:
    """Rows of ``work`` in the plan's order; each has its ``number`` in it."""
    progress = Progress(len(plan), what)
    rows = []
    for row in mapped(plan, work):
        rows.append(row)
        progress.add(row)
    return sorted(rows, key=lambda row: row["number"])


def _parts(rows: Sequence[Row]) -> dict[Split, list[str]]:
    return {split: [row[split] for row in rows if row[split]] for split in SPLITS}


def _totals(rows: Sequence[Row]) -> dict[str, Any]:
    names = [name for name in rows[0] if name not in (*SPLITS, "number")]
    made: dict[str, Any] = {name: sum(row[name] for row in rows) for name in names}
    made["share_kept"] = made.pop("kept") / max(made["tokens"], 1)
    return made


def _claims_dataset(
    prepare: Callable[Concatenate[str, str, P], Manifest],
) -> Callable[Concatenate[str, str, P], Manifest]:
    """Lets one job at a time prepare a dataset. ValueError, naming the other, if there is one."""

    @functools.wraps(prepare)
    def claiming(storage: str, name: str, /, *args: P.args, **kwargs: P.kwargs) -> Manifest:
        check_name("dataset", name)
        with claimed(Store.at(storage), "datasets", name):
            return prepare(storage, name, *args, **kwargs)

    return claiming


# --- base: text ---------------------------------------------------------------------------------


def _tokenizer(
    root: Store,
    identity: Any,
    plan: Sequence[sources.Unit],
    divided: HoldOut,
    options: ReadOptions,
    vocab_size: int,
) -> Tokenizer:
    """Trained on a sample of the text, or the one that was trained on the same sample before."""
    key = key_of("tokenizer", identity, asdict(divided), vocab_size, sample.CHARACTERS)
    known = root.child("tokenizers", _BY_INPUT)
    if known.exists(key[:16]):
        try:
            tokenizer = _by_folder(root, known.read_text(key[:16]))
        except ValueError as error:
            say(f"WARNING: {error}; it is trained again")
        else:
            say(f"tokenizer: {tokenizer.vocab_size:,} tokens (trained before)")
            return tokenizer
    began = time.perf_counter()
    tokenizer = Tokenizer.train(sample.tokenizer_sample(plan, divided, options), vocab_size)
    tokenizer.save(root.child("tokenizers", tokenizer.fingerprint[:16]))
    known.write_text(key[:16], tokenizer.fingerprint[:16])
    say(f"tokenizer: {tokenizer.vocab_size:,} tokens, {time.perf_counter() - began:.1f} s")
    return tokenizer


def _check(sequence_len: int, vocab_size: int) -> None:
    if sequence_len < 8:
        raise ValueError(f"sequence_len={sequence_len} is not allowed: 8 or more")
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is not allowed: {least} or more")


@_claims_dataset
def prepare_base(
    storage: str,
    name: str,
    *,
    text: Sequence[str] = (),
    vocab_size: int = 4096,
    sequence_len: int = 512,
    seed: int = 0,
    text_column: str = "text",
    skip_bad: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Manifest:
    """Prepares ``datasets/<name>`` from ``text`` (URIs; none is the default corpus).

    Without a ``tokenizer`` one of ``vocab_size`` tokens is trained.

    An unchanged input is not prepared twice. Raises ValueError for input that cannot be used; with
    ``skip_bad`` what cannot be read is left out, counted and named.
    """
    check_name("dataset", name)
    vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
    _check(sequence_len, vocab_size)
    root = Store.at(storage)
    check_replaceable(root, name, "base")
    dataset = root.child("datasets", name)
    options, skipped = ReadOptions(text_column=text_column, skip_bad=skip_bad), Skipped()
    found = sources.find(list(text) or [documentation_corpus(root)], options, skipped)
    identity: Any = [[s.uri, s.size, s.modified] for s in found]
    if not text:
        identity = ["documentation", documentation.key()]
    identity = [identity, asdict(options)]
    given = [tokenizer.fingerprint] if tokenizer else []
    key = key_of("base", identity, vocab_size, sequence_len, seed, *given)
    manifest = unchanged(dataset, key)
    if manifest is not None and _has_tokenizer(root, manifest):
        return manifest

    began = time.perf_counter()
    size = sum(source.text_size for source in found)
    plan = sources.units(found, skip_bad=skip_bad)
    say(f"text: {len(found):,} files, about {size / 1e6:.1f} MB, in {len(plan):,} units of work")
    divided = HoldOut.of(size, sequence_len)
    # Four rows, at about four characters a token.
    least = 16 * sequence_len
    if size <= CENSUS_BYTES:
        units = (divided.divide(corpus.read(unit, options)).census for unit in plan)
        divided = divided.settled(Census.join(list(units)), least)
    given_tokenizer = tokenizer
    if tokenizer is not None:
        tokenizer.save(root.child("tokenizers", tokenizer.fingerprint[:16]))
    while True:
        tokenizer = given_tokenizer or _tokenizer(
            root, identity, plan, divided, options, vocab_size
        )
        # A token of a trained vocabulary has 3 to 4 bytes of English.
        dtype = token_dtype(tokenizer.vocab_size)
        out = ShardWriter(dataset.uri, shards_for(size / 3.5 * dtype.itemsize), seed)
        tokenized = _Tokenized.of(plan, tokenizer, divided, options, sequence_len, out, size)
        settled = divided.settled(tokenized.census, least // tokenized.every)
        if settled == divided:
            break
        say("  the split is drawn again: the text has many duplicates")
        divided = settled
    skipped.merge(tokenized.skipped)
    about = tokenized.about | {
        "vocab_size": tokenizer.vocab_size,
        "seed": seed,
        "split": asdict(divided) | {"never": list(divided.never)},
        "skipped": asdict(skipped),
    }
    _say_duplicates(about, divided)
    _say_skipped(skipped)
    draft = Manifest(
        kind="base",
        tokenizer=tokenizer.fingerprint,
        sequence_len=sequence_len,
        dtype=str(dtype),
        splits={},
        key=key,
        about=about,
    )
    done = publish(dataset, draft, _parts(tokenized.rows), out.shards, seed)
    say(f"dataset {dataset.uri}: {summary(done)}; {time.perf_counter() - began:.0f} s")
    _say_passes(done, tokenizer.vocab_size)
    return done


def _say_passes(manifest: Manifest, vocab_size: int) -> None:
    """How often the smallest usual model would pass over the rows."""
    tokens = manifest.num_sequences("train") * manifest.sequence_len
    model = recipe.model_config(DEPTH, vocab_size, sequence_len=manifest.sequence_len)
    passes = recipe.training_tokens(model) / tokens
    say(
        f"one pass over the rows to train on is {tokens / 1e6:,.2f} M tokens; training at "
        f"--depth {DEPTH} to its full length passes over them {passes:,.1f} times"
    )
    if passes > recipe.MANY_PASSES:
        say(
            f"WARNING: more than {recipe.MANY_PASSES} passes teach little but to recite the "
            "text: give more of it, or train fewer tokens"
        )


@dataclass(frozen=True)
class _Tokenized:
    """What the first pass made of the text."""

    rows: list[Row]
    about: dict[str, Any]
    census: Census
    every: int
    """The census counted one in this many different documents."""
    skipped: Skipped

    @classmethod
    def of(
        cls,
        plan: Sequence[sources.Unit],
        tokenizer: Tokenizer,
        divided: HoldOut,
        options: ReadOptions,
        sequence_len: int,
        out: ShardWriter,
        size: int,
    ) -> _Tokenized:
        """Tokenizes and packs every unit of ``plan`` (about ``size`` bytes of text)."""
        dtype = token_dtype(tokenizer.vocab_size)
        shared = ray.put(tokenizer)
        every = max(1, size // COUNTED_BYTES)

        def tokenize(item: list[Any]) -> Row:
            number, unit = item
            tok: Tokenizer = ray.get(shared)
            skipped = Skipped()
            texts = corpus.read(tuple(sources.Source(**s) for s in unit), options, skipped)
            split = divided.divide(texts)
            counts: Row = dict.fromkeys(("documents", "bytes", "tokens", "kept"), 0)
            names: Row = {}
            for name, pieces in zip(SPLITS, (split.train, split.val), strict=True):
                documents = [np.asarray(tok.encode(text), dtype=dtype) for text in pieces]
                packed = pack_documents(
                    documents, length=sequence_len + 1, bos=tok.bos, dtype=dtype
                )
                counts["documents"] += len(pieces)
                counts["bytes"] += sum(len(text.encode()) for text in pieces)
                counts["tokens"] += packed.num_input_tokens
                counts["kept"] += packed.num_packed_tokens
                names[name] = out.write(name, number, packed.ids, None)
            census = split.census.thinned(every)
            return {
                "number": number,
                **counts,
                **names,
                "hashes": base64.b64encode(census.hashes.tobytes()).decode(),
                "sizes": base64.b64encode(census.sizes.astype(np.uint32).tobytes()).decode(),
                "skipped": asdict(skipped),
            }

        items = [[number, [asdict(source) for source in unit]] for number, unit in enumerate(plan)]
        began = time.perf_counter()
        rows = _first_pass(items, tokenize, "tokenized")
        skipped, parts = Skipped(), []
        for row in rows:
            skipped.merge(Skipped(**row.pop("skipped")))
            hashes = np.frombuffer(base64.b64decode(row.pop("hashes")), np.uint64)
            sizes = np.frombuffer(base64.b64decode(row.pop("sizes")), np.uint32)
            parts.append(Census(hashes, sizes.astype(np.int64)))
        about = _totals(rows)
        about["tokens_per_s"] = round(about["tokens"] / (time.perf_counter() - began))
        census = Census.join(parts)
        copies, share = census.duplicates()
        about |= {"duplicates": copies * every, "duplicate_share": share}
        return cls(rows, about, census, every, skipped)


def _say_duplicates(about: dict[str, Any], divided: HoldOut) -> None:
    if about["duplicates"]:
        say(
            f"duplicates: {about['duplicates']:,} of {about['documents']:,} documents are copies "
            f"of others, {about['duplicate_share']:.1%} of the text"
            + ("" if divided.by_copy else "; all copies of one are in one split")
        )
    if divided.by_copy:
        say(
            "WARNING: too little text differs to hold any of it out: the rows to validate repeat "
            "text that is trained on, so their loss says nothing about other text"
        )


def _say_skipped(skipped: Skipped) -> None:
    if skipped.count:
        say(f"WARNING: {skipped.count:,} files, lines or rows cannot be read and are left out:")
        for message in skipped.first:
            say(f"  {message}")
        if skipped.count > len(skipped.first):
            say(f"  … and {skipped.count - len(skipped.first):,} more")


# --- sft: conversations -------------------------------------------------------------------------


def find_tokenizer(root: Store, name: str) -> tuple[Tokenizer, int | None]:
    """The tokenizer of a dataset or run, with its sequence_len, or one by its fingerprint.

    Raises ValueError if ``name`` is none of these, or the beginning of several fingerprints.
    """
    check_name("tokenizer", name)
    datasets, tokenizers = root.child("datasets"), root.child("tokenizers")
    if name and datasets.exists(f"{name}/manifest.json"):
        manifest = Manifest.load(datasets.child(name))
        folder = tokenizers.child(manifest.tokenizer[:16])
        return Tokenizer.load(folder, manifest.tokenizer), manifest.sequence_len
    run = root.child("runs", name)
    if checkpoint.latest(run) is not None:
        saved = checkpoint.load_config(run)
        folder = tokenizers.child(saved.tokenizer[:16])
        return Tokenizer.load(folder, saved.tokenizer), saved.model.sequence_len
    have = [found for found in tokenizers.list() if found != _BY_INPUT]
    matches = [found for found in have if len(name) >= 4 and found.startswith(name[:16])]
    if len(matches) != 1:
        raise ValueError(
            f"tokenizer={name!r} is no dataset, no run and no fingerprint in {root.uri}; there are "
            f"the datasets {datasets.list() or 'none'} and the fingerprints {have or 'none'}"
        )
    return _by_folder(root, matches[0]), None


def _has_tokenizer(root: Store, manifest: Manifest) -> bool:
    try:
        Tokenizer.load(root.child("tokenizers", manifest.tokenizer[:16]), manifest.tokenizer)
    except ValueError as error:
        say(f"WARNING: {error}; it is made again")
        return False
    return True


def _by_folder(root: Store, name: str) -> Tokenizer:
    """The tokenizer in the folder that the first 16 digits of its fingerprint name."""
    folder = root.child("tokenizers", name)
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint[:16] != name:
        raise ValueError(
            f"{folder.uri}/tokenizer.json is damaged or another tokenizer: its fingerprint is "
            f"{tokenizer.fingerprint[:16]}"
        )
    return tokenizer


def _conversations(
    tasks: Sequence[tuple[str, int]], chats: Sequence[Conversations], seed: int
) -> list[Any]:
    """Items [number, split, slices]; a slice is [task, size of the task, first, stop].

    Every item has its share of every task, so that the rows it makes are mixed: were they of one
    task each, a model could learn to copy from the row's earlier conversations.
    """
    plan: list[Any] = []
    for split in SPLITS:
        sizes: list[tuple[str, int]] = []
        for task, count in tasks:
            wanted = count if split == "train" else max(8, min(200, count // 20))
            sizes.append((task, len(make_task(task, split, size=wanted, seed=seed))))
        sizes += [(own.name, len(own.split(split))) for own in chats]
        items = -(-sum(size for _, size in sizes) // CONVERSATIONS_PER_TASK)
        for i in range(items):
            slices = [[t, n, n * i // items, n * (i + 1) // items] for t, n in sizes]
            plan.append([len(plan), split, slices])
    return plan


@_claims_dataset
def prepare_sft(
    storage: str,
    name: str,
    *,
    tokenizer: Tokenizer,
    tasks: Sequence[tuple[str, int]] = (),
    chats: Sequence[Entry] = (),
    sequence_len: int = 512,
    seed: int = 0,
) -> Manifest:
    """Prepares ``datasets/<name>`` from tasks, given as (name, number of conversations), and from
    files of conversations.

    Raises ValueError for an unknown task or a damaged file, or if nothing fits into a row.
    """
    check_name("dataset", name)
    _check(sequence_len, tokenizer.vocab_size)
    root = Store.at(storage)
    check_replaceable(root, name, "sft")
    dataset = root.child("datasets", name)
    own = conversations.load(chats, seed)
    content = [conversations.digest(own)] if own else []
    key = key_of("sft", list(tasks), tokenizer.fingerprint, sequence_len, seed, *content)
    if (manifest := unchanged(dataset, key)) is not None:
        return manifest

    began = time.perf_counter()
    kept_in = root.child("tokenizers", tokenizer.fingerprint[:16])
    if not kept_in.exists("tokenizer.json"):
        tokenizer.save(kept_in)
    plan = _conversations(tasks, own, seed)
    counts = [*tasks, *((entry.name, len(entry.train)) for entry in own)]
    say(f"conversations: {', '.join(f'{count:,} of {task}' for task, count in counts)}")
    for entry in own:
        say(f"  {len(entry.val):,} other ones of {entry.name} are held out for validation")
    dtype = token_dtype(tokenizer.vocab_size)
    # Conversations of a hundred or two tokens, each with its mask.
    size = sum(count for _, count in counts) * 150 * (dtype.itemsize + 1)
    rows_out, length = ShardWriter(dataset.uri, shards_for(size), seed), sequence_len + 1
    shared, shared_chats = ray.put(tokenizer), ray.put({entry.name: entry for entry in own})

    def render(item: list[Any]) -> Row:
        number, split, slices = item
        tok: Tokenizer = ray.get(shared)
        own_chats: dict[str, Conversations] = ray.get(shared_chats)
        examples: list[list[Message]] = []
        for task, size, first, stop in slices:
            if task in own_chats:
                examples += own_chats[task].split(split)[first:stop]
                continue
            made = make_task(task, split, size=size, seed=seed)
            examples += [made.example(i) for i in range(first, stop)]
        order = np.arange(len(examples), dtype=np.int64)
        order = permute(order, len(order), derive_key(seed, SPLITS.index(split), number))
        rendered = [render_conversation(tok, examples[i]) for i in order]
        packed = pack_conversations(rendered, length=length, bos=tok.bos, dtype=dtype)
        return {
            "number": number,
            **dict.fromkeys(SPLITS, ""),
            split: rows_out.write(split, number, packed.ids, packed.mask),
            "documents": len(rendered),
            "dropped": packed.num_too_long,
            "tokens": sum(len(ids) for ids, _ in rendered),
            "places": packed.ids.size,
            "kept": sum(len(ids) for ids, _ in rendered if len(ids) <= length),
            "learned": int(packed.mask.sum()),
        }

    rows = _first_pass(plan, render, "rendered")
    about = _totals(rows) | {"tasks": [list(task) for task in counts], "seed": seed}
    about["share_filled"] = about["share_kept"] * about["tokens"] / max(about.pop("places"), 1)
    if about["dropped"]:
        say(f"  {about['dropped']:,} conversations are longer than {length} tokens: left out")
    draft = Manifest(
        kind="sft",
        tokenizer=tokenizer.fingerprint,
        sequence_len=sequence_len,
        dtype=str(dtype),
        splits={},
        key=key,
        about=about,
    )
    done = publish(dataset, draft, _parts(rows), rows_out.shards, seed)
    say(f"dataset {dataset.uri}: {summary(done)}; {time.perf_counter() - began:.0f} s")
    return done
