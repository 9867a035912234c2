"""The page of a run: where its curves go, and what its tables say."""

from __future__ import annotations

import re
from typing import Any

import pytest

from nanochat_ray.train.report import _ticks, curve, render


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.9, 3.1, [1.0, 1.5, 2.0, 2.5, 3.0]),
        (0.0, 10.0, [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]),
        (0.0, 100.0, [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]),
        (0.0, 16.0, [0.0, 5.0, 10.0, 15.0]),
        (0.0, 4.0, [0.0, 1.0, 2.0, 3.0, 4.0]),
        (-1.0, 2.0, [-1.0, 0.0, 1.0, 2.0]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert _ticks(low, high) == pytest.approx(ticks)


def points(svg: str) -> list[tuple[float, float]]:
    match = re.search(r'points="([^"]+)"', svg)
    assert match is not None
    pairs = [pair.split(",") for pair in match[1].split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_a_curve_by_hand() -> None:
    svg = curve("a < b", [(5, 1.0), (10, 2.0), (15, 3.0)], dots=True)
    # From 56 to 632 across, and 212 high for 0.9 to 3.1: a margin of a twentieth.
    assert points(svg) == [(56.0, 202.4), (344.0, 106.0), (632.0, 9.6)]
    assert svg.count('<circle cx="344.0" cy="106.0"') == 1
    assert svg.count("<circle") == 3
    assert "a &lt; b" in svg
    # Lines at 1, 1.5, 2, 2.5, 3; steps 6, 8, 10, 12, 14.
    assert re.findall(r'text-anchor="end">([^<]+)<', svg) == ["1", "1.5", "2", "2.5", "3"]
    assert '<line x1="56" x2="640" y1="106.0" y2="106.0"' in svg
    assert '<text x="50" y="110.0" text-anchor="end">2<' in svg
    assert re.findall(r'text-anchor="middle">([^<]+)<', svg) == ["6", "8", "10", "12", "14"]
    assert '<text x="344.0" y="232" text-anchor="middle">10<' in svg
    assert "<circle" not in curve("a", [(1, 1.0), (2, 2.0)])


def test_the_first_losses_do_not_flatten_the_rest() -> None:
    """Of more than 50 values the top two hundredths are cut off at the upper edge."""
    values = [(step, 100.0 if step == 0 else 2.0 - step / 100) for step in range(101)]
    many, few = points(curve("loss", values)), points(curve("loss", values[:50]))
    assert many[0][1] == 0.0
    assert many[50][1] == pytest.approx(106, abs=6)  # in the middle
    assert few[0][1] == pytest.approx(212 * 0.05 / 1.1, abs=0.1)
    assert few[49][1] > 200


def test_a_constant_curve_is_in_the_middle() -> None:
    assert points(curve("a", [(3, 2.0)])) == [(56.0, 106.0)]


RECORDS: list[dict[str, Any]] = [
    {"kind": "eval", "step": 0, "bits_per_byte": 3.0, "pass@1": 0.5},
    {"kind": "sample", "step": 0, "prompt": "old", "text": "x"},
    {"kind": "train", "step": 1, "loss": 2.5, "lr_factor": 1.0, "grad_norm": float("inf")},
    {"kind": "train", "step": 2, "loss": 2.0, "lr_factor": 1.0, "grad_norm": float("nan")},
    {"kind": "sample", "step": 2, "prompt": "new", "text": "<y>", "reward": 0.5},
    {"kind": "sample", "step": 2, "prompt": "next", "text": "z"},
]


def test_the_page_of_a_run() -> None:
    summary = {
        "tokens": 12_345,
        "train_seconds": 95.0,
        "tokens_per_s": 1_234.5,
        "data_wait_share": 0.0125,
        "longest_save_stall_s": 0.25,
        "bits_per_byte": 1.5,
        "best_val_loss": 0.75,
        "saves": 3,
    }
    page = render("run <1>", RECORDS, summary, about={"a": 1}, hardware={"device": "CPU"})
    rows = dict(re.findall(r"<tr><td>([^<]*)</td><td>([^<]*)</td></tr>", page))
    assert rows == {
        "tokens": "12,345",
        "time in steps": "1:35",
        "tokens per second": "1,234",
        "waiting for data": "1.25%",
        "stall of a checkpoint": "0.250 s at most",
        "bits per byte": "1.5000",
        "best val loss": "0.7500",
        "next": "z",
        "device": "CPU",
    }
    titles = re.findall("<h2>([^<]*)</h2>", page)
    # The norms are not finite, so there is nothing to draw.
    assert titles == [
        "validation, bits per byte",
        "validation, pass@1",
        "training loss (nats per token)",
        "learning rate (share of the full one)",
        "Greedy texts after step 2",
        "Hardware",
        "Configuration",
    ]
    assert "<td>new</td><td>&lt;y&gt;</td><td>reward 0.5</td>" in page
    assert "old" not in page
    assert "<h1>Run run &lt;1&gt;</h1>" in page
    assert "texts after" not in render("r", RECORDS[:1], {}, about={}, hardware={})
    # Validations have dots, steps do not.
    assert [svg.count("<circle") for svg in page.split("<h2>")[1:5]] == [1, 1, 0, 0]
