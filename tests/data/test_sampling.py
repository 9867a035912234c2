"""The steps of a tokenizer's sample, by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat_ray.data import tokenizer_sample as sampling
from nanochat_ray.data.decoding import BLOCK_BYTES
from nanochat_ray.data.sources import DEFAULT, Source


def parts(*sizes: int, name: str = "a.txt") -> list[Source]:
    return [Source(uri=name, size=size, mtime_ns=number) for number, size in enumerate(sizes)]


def numbers(sources: list[Source]) -> list[int]:
    return [source.mtime_ns for source in sources]


@pytest.mark.parametrize(
    ("count", "golden"),
    [(3, [1, 5, 8]), (1, [5]), (0, [5]), (10, list(range(10))), (99, list(range(10)))],
)
def test_items_are_spread_evenly(count: int, golden: list[int]) -> None:
    """The middle of each of ``count`` equal parts of ten items."""
    assert numbers(sampling._evenly(parts(*[1] * 10), count)) == golden


@pytest.mark.parametrize(
    ("sizes", "budget", "golden"),
    [
        # Two of the mean size of 25 fit: points at 25 and 75 of 100.
        ((10, 20, 30, 40), 50, [1, 3]),
        ((10, 20, 30, 40), 1, [2]),  # one at least, at 50
        ((10, 20, 30, 40), 99, [1, 2, 3]),  # four points, none of which is in the first
        ((10, 20, 30, 40), 100, [0, 1, 2, 3]),
        ((97, 1, 1, 1), 50, [0]),  # both points are in the large one
        ((50, 50), 50, [1]),  # a point between two parts is in the second
        ((500,), 5, [0]),
    ],
)
def test_parts_are_chosen_by_their_text(
    sizes: tuple[int, ...], budget: float, golden: list[int]
) -> None:
    assert numbers(sampling._spread(parts(*sizes), budget)) == golden


def test_compressed_text_counts_three_times() -> None:
    sizes = [s.text_size for name in ("a.txt", "a.txt.gz", "a.parquet", "a.jsonl")
             for s in parts(10, name=name)]  # fmt: skip
    assert sizes == [10, 30, 30, 10]


@pytest.mark.parametrize(
    ("count", "size", "golden"),
    [
        # 20 characters are more than twice 8: every second one of four stays, 12 characters; two
        # thirds of them are taken, to the nearest chunk.
        (6, 8, [0, 4]),
        (3, 99, [0, 1, 2]),
        (2, 8, [0, 1]),
        (4, 8, [0, 2]),  # 16 are not too many: half of them
        (1, 3, [0]),
        (1, 1, []),
    ],
)
def test_chunks_are_sampled_evenly(count: int, size: float, golden: list[int]) -> None:
    sample = sampling._sample((str(n) * 4 for n in range(count)), size)
    assert sample == [str(n) * 4 for n in golden]


def test_no_chunks_are_no_sample() -> None:
    assert sampling._sample([], 9.0) is None


@pytest.mark.parametrize(
    ("size", "share", "golden"),
    [
        (40_000, 1.0, [2, 2, 1]),
        (40_000, 0.5, [4, 1]),
        (64_000, 1.0, [1] * 5),
        (63_999, 1.0, [2, 2, 1]),
        (1, 1.0, [5]),
    ],
)
def test_groups_give_enough(size: int, share: float, golden: list[int]) -> None:
    plan = [tuple(parts(size, size)), tuple(parts(size, size, size))]
    assert [len(group) for group in sampling._groups(plan, share)] == golden


def test_spots_of_a_span_are_blocks() -> None:
    (part,) = parts(10 * BLOCK_BYTES)
    part = replace(part, span=(0, 10 * BLOCK_BYTES))
    assert sampling._spots(part, part.size) == [part]
    spots = sampling._spots(part, 3 * BLOCK_BYTES)
    assert [s.span for s in spots] == [(n * BLOCK_BYTES, (n + 1) * BLOCK_BYTES) for n in (1, 5, 8)]
    assert {s.size for s in spots} == {BLOCK_BYTES}


def test_spots_of_a_table_are_row_groups() -> None:
    (part,) = parts(4000, name="a.parquet")
    part = replace(part, groups=tuple(range(40)))
    assert sampling._spots(part, 12_000) == [part]
    spots = sampling._spots(part, 100)
    # Sixteen of forty, each a fortieth of the size.
    assert [s.groups for s in spots[:3]] == [(1,), (3,), (6,)]
    assert (len(spots), {s.size for s in spots}) == (16, {100})
    one = replace(part, groups=(7,))
    assert sampling._spots(one, 100) == [one]


@pytest.mark.parametrize(("budget", "count"), [(20, 2), (20.5, 3), (1, 1), (999, 5)])
def test_documents_end_at_the_budget(budget: float, count: int, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n}" * 10}) + "\n" for n in range(5)))
    source = Source(uri=str(file), size=file.stat().st_size, mtime_ns=0)
    documents = list(sampling._documents(source, budget, DEFAULT))
    assert documents == [f"{n}" * 10 for n in range(count)]
