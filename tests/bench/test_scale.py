"""The simulation of a large preparation and of many ranks counts as one does by hand."""

from __future__ import annotations

import json

import pytest

from nanochat_ray.bench import scale
from nanochat_ray.bench.scale import Args

# 128 files of 9 MB, each a unit; 0.99 · 10^9 tokens of 2 bytes are 29 shards of 64 MiB.
SMALL = Args(text_gb=3.456, file_mb=9, sequence_len=512, vocab_size=4096, ranks=256, depth=2)


def test_counts_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(SMALL)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("3.456 GB of text, 256 ranks")
    plan, first, second, order, optimizer = json.loads(last)["stages"]
    assert plan["counts"] == {"files": 128, "units": 128}
    assert first["counts"]["tasks"] == 128
    assert first["peak_mb"] > 0
    counts = second["counts"]
    assert (counts["tasks"], counts["reads"]) == (29, 2 * 128 * 29)
    assert counts["bytes of offsets"] == 16 * 128 * 29
    # 987 million tokens in sequences of 512, each with one id more, over 128 · 29 reads.
    per_read = 3.456e9 / 3.5 / 512 * 513 * 2 / (128 * 29)
    assert counts["bytes of a read"] == pytest.approx(per_read, rel=1e-6)
    assert order["counts"]["sequences"] == pytest.approx(3.456e9 / 3.5 / 512, rel=1e-3)
    counts = optimizer["counts"]
    assert counts["bytes of a checkpoint, read once"] == 12 * counts["parameters"]
    # Two layers have fewer matrices than there are ranks: none is padded to 256 of them.
    assert 1 <= counts["times as large with padding"] < 1.001


@pytest.mark.parametrize("name", ["text_gb", "file_mb", "ranks", "depth"])
def test_nothing_is_no_size(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}=0 is not allowed"):
        Args(**{name: 0})
