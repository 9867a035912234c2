"""The text that a tokenizer is trained on: an even sample of all sources, by bytes.

Sources stand in a row, by name; every stretch of that row gives its share, so that one huge file
and many small ones, languages and formats are in the sample as they are in the text. The sample
depends on the text and on how it is divided alone, and little more than it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from nanochat_ray.data import corpus
from nanochat_ray.data.holdout import HoldOut
from nanochat_ray.data.sources import DEFAULT, ReadOptions, Source, Unit

CHARACTERS = 16_000_000
"""Of a sample, about."""
STRETCH = 64_000
"""Characters that are drawn from one stretch of the text, at least."""
READ = 4
"""Characters that are read for each that is drawn, where a source can be read in part."""
READ_THROUGH = 64
"""The same where a source can only be read from its start."""
MAX_GROUPS = 16
"""Row groups of a Parquet file that one stretch is drawn from."""


def _even(items: Sequence[Source], count: int) -> list[Source]:
    """``count`` of ``items``, evenly spread."""
    count = max(1, min(count, len(items)))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _spots(part: Source, budget: float) -> list[Source]:
    """Evenly spread spots of a part of a file that hold about ``budget`` bytes of text."""
    if part.text_size <= budget:
        return [part]
    if part.span is not None:
        spans = [replace(part, span=b, size=b[1] - b[0]) for b in corpus.blocks(part.span)]
        return _even(spans, round(budget / corpus.BLOCK_BYTES))
    if len(part.groups) > 1:
        size = part.size // len(part.groups)
        return _even([replace(part, groups=(g,), size=size) for g in part.groups], MAX_GROUPS)
    return [part]


def _spread(parts: Sequence[Source], budget: float) -> list[Source]:
    """Those of ``parts`` that evenly spaced points of their text fall into."""
    total = sum(part.text_size for part in parts)
    if total <= budget or len(parts) == 1:
        return list(parts)
    step = total / max(1, round(budget / (total / len(parts))))
    chosen, point, end = [], step / 2, 0
    for part in parts:
        end += part.text_size
        if point < end:
            chosen.append(part)
            while point < end:
                point += step
    return chosen


def _documents(spot: Source, budget: float, options: ReadOptions) -> Iterator[str]:
    """The documents of a spot, up to about ``budget`` characters."""
    taken = 0
    for document in corpus.read((spot,), options):
        yield document
        taken += len(document)
        if taken >= budget:
            return


def _drawn(pieces: Iterable[str], size: float) -> list[str] | None:
    """About ``size`` characters of ``pieces``, evenly spread, however many there turn out to be.

    None if there are no pieces.
    """
    kept: list[str] = []
    stride, total = 1, 0
    for number, piece in enumerate(pieces):
        if number % stride:
            continue
        kept.append(piece)
        total += len(piece)
        if total > 2 * size and len(kept) > 1:
            kept = kept[::2]
            total = sum(map(len, kept))
            stride *= 2
    chosen, passed, taken = [], 0, 0
    for piece in kept:
        passed += len(piece)
        # The share of what has passed that is to be taken, to the nearest piece.
        if taken + len(piece) / 2 <= min(1.0, size / max(total, 1)) * passed:
            chosen.append(piece)
            taken += len(piece)
    return chosen if kept else None


def _stretches(plan: Sequence[Unit], share: float) -> Iterator[list[Source]]:
    """Parts one after the other, grouped so that each group gives ``STRETCH`` or more."""
    group: list[Source] = []
    size = 0
    for unit in plan:
        for part in unit:
            group.append(part)
            size += part.text_size
            if size * share >= STRETCH:
                yield group
                group, size = [], 0
    if group:
        yield group


def tokenizer_sample(
    plan: Sequence[Unit],
    divided: HoldOut,
    options: ReadOptions = DEFAULT,
    characters: int = CHARACTERS,
) -> Iterator[str]:
    """About ``characters`` of the text of ``plan``, none of it held out; all if it is not more.

    Raises ValueError, naming the file, for what cannot be read, unless ``options`` skip that.
    """
    total = sum(part.text_size for unit in plan for part in unit)
    share = min(1.0, characters / max(total, 1))
    if share == 1:
        for unit in plan:
            yield from divided.divide(corpus.read(unit, options)).train
        return
    # From the end: what a part has too little of is then taken from the one before, where a line
    # begins that is longer than parts.
    missing = 0.0
    for group in reversed(list(_stretches(plan, share))):
        size = sum(part.text_size for part in group) * share + missing
        missing = size
        if size <= 0:
            continue
        drawn = _drawn(_pieces(_spread(group, READ * size), size, divided, options), size)
        if drawn is None:
            drawn = _drawn(_pieces(group, size, divided, options, whole=True), size)
        if drawn is not None:
            yield from drawn
            missing = min(size - sum(map(len, drawn)), 4 * STRETCH)


def _pieces(
    parts: Sequence[Source],
    size: float,
    divided: HoldOut,
    options: ReadOptions,
    *,
    whole: bool = False,
) -> Iterator[str]:
    """Pieces of ``parts``, of which about ``size`` characters are to be drawn."""
    for part in parts:
        spots = [part] if whole else _spots(part, READ * size / len(parts))
        read = READ_THROUGH if spots[0] is part else READ
        for spot in spots:
            for document in _documents(spot, read * size / (len(parts) * len(spots)), options):
                yield from divided.divide([document]).train
