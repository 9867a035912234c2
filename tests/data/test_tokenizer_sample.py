"""What the tokenizer is trained on: an even share of every source, however they are skewed."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat_ray.data import corpus, decoding, plain_text, sources, tokenizer_sample
from nanochat_ray.data.sources import ReadOptions
from nanochat_ray.data.split import SplitRule
from nanochat_ray.text.tokenizer import Tokenizer

ALL = SplitRule(max_chunk_chars=1000, hash_limit=0)


@pytest.fixture(autouse=True)
def _small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "UNIT_BYTES", 20_000)
    monkeypatch.setattr(decoding, "BLOCK_BYTES", 5_000)
    monkeypatch.setattr(plain_text, "LINE_BYTES", 200)
    monkeypatch.setattr(tokenizer_sample, "GROUP_CHARS", 500)


def sample(folder: Path, characters: int, rule: SplitRule = ALL) -> list[str]:
    plan = sources.units(sources.find([str(folder)]))
    return list(tokenizer_sample.tokenizer_sample(plan, rule, ReadOptions(), characters))


def letters(size: int, letter: str) -> str:
    """Lines of one letter and a number."""
    return "".join(f"{letter * 40} {i}\n" for i in range(size // 45))[:size]


def write(path: Path, text: str, kind: str) -> None:
    lines = text.splitlines()
    if kind == "txt":
        path.with_suffix(".txt").write_text(text)
    elif kind == "one line":
        path.with_suffix(".txt").write_text(text.replace("\n", " "))
    elif kind == "jsonl":
        path.with_suffix(".jsonl").write_text("\n".join(json.dumps({"text": x}) for x in lines))
    elif kind == "one document":
        path.with_suffix(".jsonl").write_text(json.dumps({"text": text}))
    elif kind == "gz":
        path.with_suffix(".txt.gz").write_bytes(gzip.compress(text.encode()))
    elif kind == "csv":
        path.with_suffix(".csv").write_text("text\n" + text)
    elif kind == "many files":
        for i in range(0, len(text), 2000):
            path.with_name(f"{path.name}-{i:07d}.txt").write_text(text[i : i + 2000])
    else:
        groups = len(lines) if kind == "parquet of one group" else 100
        table = pa.table({"text": lines})
        pq.write_table(table, path.with_suffix(".parquet"), row_group_size=groups)


KINDS = (
    *("txt", "one line", "jsonl", "one document", "gz", "csv", "many files"),
    *("parquet", "parquet of one group"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_both_halves_of_an_input_are_sampled(tmp_path: Path, kind: str) -> None:
    """As one source with both, where its kind allows that: the second half counts as the first."""
    text = letters(200_000, "a") + letters(200_000, "b")
    write(tmp_path / "x", text, kind)
    counts = Counter("".join(sample(tmp_path, 20_000)))
    total = counts["a"] + counts["b"]
    assert 5_000 < total < 45_000
    assert 0.35 < counts["a"] / total < 0.65


@pytest.mark.parametrize("kind", KINDS)
def test_sources_count_by_their_bytes(tmp_path: Path, kind: str) -> None:
    write(tmp_path / "a", letters(300_000, "a"), kind)
    if kind in ("gz", "parquet", "parquet of one group"):
        # Their text is only known when it is read: they are weighed against their like.
        write(tmp_path / "b", letters(100_000, "b"), kind)
    else:
        write(tmp_path / "b", letters(100_000, "b"), "many files")
    counts = Counter("".join(sample(tmp_path, 40_000)))
    assert 0.55 < counts["a"] / (counts["a"] + counts["b"]) < 0.9


def test_one_huge_file_beside_many_small_ones(tmp_path: Path) -> None:
    for i in range(300):
        (tmp_path / f"a{i:03d}.txt").write_text(f"a{i} " + "a" * 300)
    (tmp_path / "huge.txt").write_text(letters(300_000, "b"))
    (tmp_path / "z.txt").write_text(letters(100_000, "c"))
    counts = Counter("".join(sample(tmp_path, 50_000)))
    total = sum(counts[letter] for letter in "abc")
    assert [counts[letter] / total for letter in "abc"] == pytest.approx(
        [91 / 491, 300 / 491, 100 / 491], abs=0.08
    )


def test_a_sample_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.txt").write_text(letters(4_000_000, "a"))
    read = 0
    plain = corpus.read

    def count_and_read(unit: sources.Unit, options: ReadOptions) -> list[str]:
        nonlocal read
        texts = list(plain(unit, options))
        read += sum(map(len, texts))
        return texts

    monkeypatch.setattr(corpus, "read", count_and_read)
    assert sum(map(len, sample(tmp_path, 20_000))) > 5_000
    assert read < 600_000


def test_the_sample_has_no_validation_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text(letters(30_000, "a"))
    rule = SplitRule(max_chunk_chars=500, hash_limit=2**62)
    split = rule.split([letters(30_000, "a")])
    assert sample(tmp_path, 10**6, rule) == split.train
    assert set(sample(tmp_path, 9_000, rule)) <= set(split.train)
    assert sample(tmp_path, 9_000) == sample(tmp_path, 9_000)


def test_a_second_language_is_not_spelt_in_bytes(tmp_path: Path) -> None:
    """40 MB of English and 40 MB of Russian, with all sizes 100 times smaller."""
    english = "The sea was calm that morning, and nobody spoke of the storm. "
    russian = "Море было спокойно тем утром, и никто не говорил о прошедшей буре. "
    (tmp_path / "a.txt").write_text(english * (400_000 // len(english)))
    (tmp_path / "b.txt").write_text(russian * (400_000 // len(russian.encode())))
    tok = Tokenizer.train(sample(tmp_path, 160_000), 800)
    for text in (english, russian):
        assert len(text.encode()) / len(tok.encode(text)) > 3
