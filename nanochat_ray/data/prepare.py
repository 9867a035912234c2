"""Preparation: raw text or conversations in, shuffled Arrow shards and a manifest out.

Two passes. In the first, each task reads, tokenizes and packs one unit of input, and scatters its
sequences over the shards, as shuffle parts. In the second, each task gathers one shard from all
parts. A task holds no more than one unit or one shard in memory, and the dataset is a function of
the input, the parameters and the seed: where ``map_tasks`` runs the tasks does not change a bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from nanochat_ray.checks import check_int
from nanochat_ray.data import corpus, documentation, sources, tokenizers
from nanochat_ray.data.documentation import documentation_corpus
from nanochat_ray.data.map_tasks import MapTasks
from nanochat_ray.data.progress import log
from nanochat_ray.data.publish import DatasetWriter, key_of, open_dataset, summary
from nanochat_ray.data.render_conversations import (
    Mixture,
    RenderConversations,
    plan_tasks,
    render_conversations,
)
from nanochat_ray.data.shards import Manifest, token_dtype
from nanochat_ray.data.sources import ReadOptions, Unit, Unreadable
from nanochat_ray.data.split import Census, SplitRule
from nanochat_ray.data.tokenize_text import (
    TokenizedText,
    TokenizeUnit,
    census_stride,
    tokenize_text,
)
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer, folder_of

CENSUS_FIRST_BYTES = 8 << 20
"""The split rule of text up to this size is adjusted before it is tokenized, else after."""
BYTES_PER_TOKEN = 3.5
"""A token of a trained vocabulary has 3 to 4 bytes of English."""
TOKENS_PER_CONVERSATION = 150
MIN_SEQUENCE_LEN = 8
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def _check(sequence_len: int, vocab_size: int) -> None:
    check_int("sequence_len", sequence_len, MIN_SEQUENCE_LEN)
    check_int("vocab_size", vocab_size, MIN_VOCAB_SIZE)


# --- base: text ---------------------------------------------------------------------------------


def prepare_base(
    storage: str,
    name: str,
    *,
    map_tasks: MapTasks,
    text: Sequence[str] = (),
    vocab_size: int = 4096,
    sequence_len: int = 512,
    seed: int = 0,
    text_column: str = "text",
    skip_bad: bool = False,
    tokenizer: Tokenizer | None = None,
) -> Manifest:
    """Prepares ``datasets/<name>`` from ``text`` (URIs; none is the default corpus).

    Without a ``tokenizer`` one of ``vocab_size`` tokens is trained. An unchanged input is not
    prepared twice. Raises ValueError for input that cannot be used; with ``skip_bad`` what cannot
    be read is left out, counted and named. Raises ClaimLostError, and publishes nothing, if another
    process takes the dataset over.
    """
    vocab_size = tokenizer.vocab_size if tokenizer else vocab_size
    _check(sequence_len, vocab_size)
    with open_dataset(storage, name, "base", map_tasks) as dataset:
        options, unreadable = ReadOptions(text_column=text_column, skip_bad=skip_bad), Unreadable()
        uris = list(text) or [documentation_corpus(dataset.root, map_tasks)]
        files = sources.find(uris, options, unreadable)
        identity: Any = [[file.uri, file.size, file.mtime_ns] for file in files]
        if not text:
            identity = ["documentation", documentation.key()]
        identity = [identity, asdict(options)]
        fingerprints = [tokenizer.fingerprint] if tokenizer else []
        key = key_of("base", identity, vocab_size, sequence_len, seed, *fingerprints)
        manifest = dataset.load_if_up_to_date(key)
        if manifest is not None and tokenizers.is_intact(dataset.root, manifest.tokenizer):
            return manifest
        size = sum(file.text_size for file in files)
        plan = sources.units(files, skip_bad=skip_bad)
        log(
            f"text: {len(files):,} files, about {size / 1e6:.1f} MB, in {len(plan):,} units of work"
        )
        recipe = _TextRecipe(
            dataset=dataset,
            plan=plan,
            size=size,
            options=options,
            sequence_len=sequence_len,
            seed=seed,
        )
        if tokenizer is not None:
            tokenizers.save(dataset.root, tokenizer)
        return recipe.prepare(key, identity, vocab_size, tokenizer, unreadable)


@dataclass(frozen=True, kw_only=True)
class _TextRecipe:
    """The steps of ``prepare_base`` once the input is known."""

    dataset: DatasetWriter
    plan: Sequence[Unit]
    size: int
    """Approximate bytes of text."""
    options: ReadOptions
    sequence_len: int
    seed: int

    @property
    def min_val_chars(self) -> int:
        """Four sequences, at about four characters a token."""
        return 16 * self.sequence_len

    def prepare(
        self,
        key: str,
        identity: Any,
        vocab_size: int,
        tokenizer: Tokenizer | None,
        unreadable: Unreadable,
    ) -> Manifest:
        """Split rule, tokenizer, first pass; again if the census asks for another rule; publish."""
        start = time.perf_counter()
        rule = self._first_rule()
        while True:
            root, options = self.dataset.root, self.options
            tok = tokenizer or tokenizers.train_or_load(
                root, identity, self.plan, rule, options, vocab_size
            )
            work = self._work(tok, rule)
            result = tokenize_text(self.dataset.map_tasks, self.plan, work)
            next_rule = rule.adjust(result.census, self.min_val_chars // work.stride)
            if next_rule == rule:
                break
            log("  the text has many duplicates: it is split again")
            rule = next_rule
        unreadable.merge(result.unreadable)
        _log_duplicates(result.about, rule)
        _log_unreadable(unreadable)
        manifest = self.dataset.publish(
            self._draft(key, tok, rule, result, unreadable), result.results, work.out
        )
        _log_dataset(self.dataset, manifest, start)
        return manifest

    def _first_rule(self) -> SplitRule:
        rule = SplitRule.for_text(self.size, self.sequence_len)
        if self.size > CENSUS_FIRST_BYTES:
            return rule
        units = (rule.split(corpus.read(unit, self.options)).census for unit in self.plan)
        return rule.adjust(Census.concat(units), self.min_val_chars)

    def _work(self, tokenizer: Tokenizer, rule: SplitRule) -> TokenizeUnit:
        dtype = token_dtype(tokenizer.vocab_size)
        return TokenizeUnit(
            tokenizer=tokenizer,
            rule=rule,
            options=self.options,
            sequence_len=self.sequence_len,
            out=self.dataset.shard_writer(self.size / BYTES_PER_TOKEN * dtype.itemsize, self.seed),
            stride=census_stride(self.size),
        )

    def _draft(
        self,
        key: str,
        tokenizer: Tokenizer,
        rule: SplitRule,
        text: TokenizedText,
        unreadable: Unreadable,
    ) -> Manifest:
        return Manifest(
            kind="base",
            tokenizer=tokenizer.fingerprint,
            sequence_len=self.sequence_len,
            dtype=str(token_dtype(tokenizer.vocab_size)),
            splits={},
            key=key,
            about={
                **text.about,
                "vocab_size": tokenizer.vocab_size,
                "seed": self.seed,
                "split": rule.to_json(),
                "skipped": asdict(unreadable),
            },
        )


# --- sft: conversations -------------------------------------------------------------------------


def prepare_sft(
    storage: str,
    name: str,
    *,
    map_tasks: MapTasks,
    mixture: Mixture,
    tokenizer: Tokenizer,
    sequence_len: int = 512,
) -> Manifest:
    """Prepares ``datasets/<name>`` from the conversations of ``mixture``, in an order of its seed.

    An unchanged mixture is not prepared twice. Raises ValueError for an unknown task, or if no
    conversation fits into a sequence; ClaimLostError, and publishes nothing, if another process
    takes the dataset over.
    """
    _check(sequence_len, tokenizer.vocab_size)
    with open_dataset(storage, name, "sft", map_tasks) as dataset:
        tasks, digests = mixture.identity()
        key = key_of("sft", tasks, tokenizer.fingerprint, sequence_len, mixture.seed, *digests)
        if (manifest := dataset.load_if_up_to_date(key)) is not None:
            return manifest
        start = time.perf_counter()
        if not folder_of(dataset.root, tokenizer.fingerprint).exists("tokenizer.json"):
            tokenizers.save(dataset.root, tokenizer)
        plan, counts = plan_tasks(mixture), mixture.counts()
        _log_mixture(counts, plan)
        dtype = token_dtype(tokenizer.vocab_size)
        num_tokens = sum(count for _, count in counts) * TOKENS_PER_CONVERSATION
        work = RenderConversations(
            tokenizer=tokenizer,
            mixture=mixture,
            sequence_len=sequence_len,
            out=dataset.shard_writer(num_tokens * (dtype.itemsize + 1), mixture.seed),
        )
        results, about = render_conversations(map_tasks, plan, work)
        if about["dropped"]:
            log(
                f"  {about['dropped']:,} conversations are longer than {sequence_len + 1} tokens: "
                "left out"
            )
        draft = Manifest(
            kind="sft",
            tokenizer=tokenizer.fingerprint,
            sequence_len=sequence_len,
            dtype=str(dtype),
            splits={},
            key=key,
            about={**about, "tasks": [list(count) for count in counts], "seed": mixture.seed},
        )
        manifest = dataset.publish(draft, results, work.out)
        _log_dataset(dataset, manifest, start)
        return manifest


# --- messages -----------------------------------------------------------------------------------


def _log_dataset(dataset: DatasetWriter, manifest: Manifest, start: float) -> None:
    seconds = time.perf_counter() - start
    log(f"dataset {dataset.store.uri}: {summary(manifest)}; {seconds:.0f} s")


def _log_duplicates(about: dict[str, Any], rule: SplitRule) -> None:
    if about["duplicates"]:
        log(
            f"duplicates: {about['duplicates']:,} of {about['documents']:,} documents are copies "
            f"of others, {about['duplicate_share']:.1%} of the text"
            + ("" if rule.separates_copies else "; all copies of one are in one split")
        )
    if rule.separates_copies:
        log(
            "WARNING: too little of the text differs for a validation split: the validation "
            "sequences repeat text that is trained on, so their loss says nothing about other text"
        )


def _log_unreadable(unreadable: Unreadable) -> None:
    if unreadable.count:
        log(f"WARNING: {unreadable.count:,} files, lines or rows cannot be read and are left out:")
        for message in unreadable.first:
            log(f"  {message}")
        if unreadable.count > len(unreadable.first):
            log(f"  … and {unreadable.count - len(unreadable.first):,} more")


def _log_mixture(counts: Sequence[tuple[str, int]], plan: Sequence[Any]) -> None:
    log(f"conversations: {', '.join(f'{count:,} of {source}' for source, count in counts)}")
    slices: list[Any] = next((slices for _, split, slices in plan if split == "val"), [])
    val = ", ".join(f"{size:,} of {source}" for source, size, _, _ in slices)
    log(f"  for validation, none of them among those: {val}")
