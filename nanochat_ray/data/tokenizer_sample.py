"""The text that a tokenizer is trained on: an even sample of all sources, by bytes.

The sources are ordered by name and grouped; every group gives its share, so that one huge file and
many small ones, languages and formats are in the sample as they are in the text. The sample depends
on the text and its split rule only, and reads little more than it yields.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from nanochat_ray.data import corpus, decoding, plain_text
from nanochat_ray.data.sources import DEFAULT, ReadOptions, Source, Unit
from nanochat_ray.data.split import SplitRule

SAMPLE_CHARS = 16_000_000
"""Approximate characters of a sample."""
GROUP_CHARS = 64_000
"""Least characters that a group of sources gives."""
READ_FACTOR = 4
"""Characters read for each that is sampled, where a source can be read in part."""
SEQUENTIAL_READ_FACTOR = 64
"""The same where a source can only be read from its start."""
MAX_ROW_GROUPS = 16
"""Row groups of a Parquet file that one group of sources samples."""


def _evenly(items: Sequence[Source], count: int) -> list[Source]:
    """``count`` of ``items``, evenly spread."""
    count = max(1, min(count, len(items)))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _spots(part: Source, budget: float) -> list[Source]:
    """Evenly spread spots of a part of a file that hold about ``budget`` bytes of text."""
    if part.text_size <= budget:
        return [part]
    if part.span is not None:
        spans = [replace(part, span=b, size=b[1] - b[0]) for b in plain_text.block_spans(part.span)]
        return _evenly(spans, round(budget / decoding.BLOCK_BYTES))
    if len(part.groups) > 1:
        size = part.size // len(part.groups)
        groups = [replace(part, groups=(g,), size=size) for g in part.groups]
        return _evenly(groups, MAX_ROW_GROUPS)
    return [part]


def _spread(parts: Sequence[Source], budget: float) -> list[Source]:
    """Those of ``parts`` that evenly spaced points of their text fall into."""
    total = sum(part.text_size for part in parts)
    if total <= budget or len(parts) == 1:
        return list(parts)
    step = total / max(1, round(budget / (total / len(parts))))
    result, point, end = [], step / 2, 0
    for part in parts:
        end += part.text_size
        if point < end:
            result.append(part)
            while point < end:
                point += step
    return result


def _documents(spot: Source, budget: float, options: ReadOptions) -> Iterator[str]:
    """The documents of a spot, up to about ``budget`` characters."""
    total = 0
    for document in corpus.read((spot,), options):
        yield document
        total += len(document)
        if total >= budget:
            return


def _sample(chunks: Iterable[str], size: float) -> list[str] | None:
    """About ``size`` characters of ``chunks``, evenly spread, however many there turn out to be.

    None if there are no chunks.
    """
    candidates: list[str] = []
    stride, total = 1, 0
    for number, chunk in enumerate(chunks):
        if number % stride:
            continue
        candidates.append(chunk)
        total += len(chunk)
        if total > 2 * size and len(candidates) > 1:
            candidates = candidates[::2]
            total = sum(map(len, candidates))
            stride *= 2
    share = min(1.0, size / max(total, 1))
    result, candidate_chars, sample_chars = [], 0, 0
    for chunk in candidates:
        candidate_chars += len(chunk)
        # Keeps the sample at its share of the candidates so far, to the nearest chunk.
        if sample_chars + len(chunk) / 2 <= share * candidate_chars:
            result.append(chunk)
            sample_chars += len(chunk)
    return result if candidates else None


def _groups(plan: Sequence[Unit], share: float) -> Iterator[list[Source]]:
    """Neighbouring sources, grouped so that each group gives ``GROUP_CHARS`` or more."""
    group: list[Source] = []
    size = 0
    for unit in plan:
        for part in unit:
            group.append(part)
            size += part.text_size
            if size * share >= GROUP_CHARS:
                yield group
                group, size = [], 0
    if group:
        yield group


def tokenizer_sample(
    plan: Sequence[Unit],
    rule: SplitRule,
    options: ReadOptions = DEFAULT,
    characters: int = SAMPLE_CHARS,
) -> Iterator[str]:
    """About ``characters`` of the training split of ``plan``; all of it if it is not more.

    Raises ValueError, naming the file, for what cannot be read, unless ``options`` skip that.
    """
    total = sum(part.text_size for unit in plan for part in unit)
    share = min(1.0, characters / max(total, 1))
    if share == 1:
        for unit in plan:
            yield from rule.split(corpus.read(unit, options)).train
        return
    # From the end: a group that has too little passes the rest to the group before it, where a
    # line begins that is longer than a part.
    missing = 0.0
    for group in reversed(list(_groups(plan, share))):
        size = sum(part.text_size for part in group) * share + missing
        missing = size
        if size <= 0:
            continue
        sample = _sample(_chunks(_spread(group, READ_FACTOR * size), size, rule, options), size)
        if sample is None:
            sample = _sample(_chunks(group, size, rule, options, whole=True), size)
        if sample is not None:
            yield from sample
            missing = min(size - sum(map(len, sample)), 4 * GROUP_CHARS)


def _chunks(
    parts: Sequence[Source],
    size: float,
    rule: SplitRule,
    options: ReadOptions,
    *,
    whole: bool = False,
) -> Iterator[str]:
    """Training chunks of ``parts``, of which about ``size`` characters will be sampled."""
    for part in parts:
        spots = [part] if whole else _spots(part, READ_FACTOR * size / len(parts))
        factor = SEQUENTIAL_READ_FACTOR if spots[0] is part else READ_FACTOR
        for spot in spots:
            for document in _documents(spot, factor * size / (len(parts) * len(spots)), options):
                yield from rule.split([document]).train
