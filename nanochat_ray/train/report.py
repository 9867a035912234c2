"""A run as one self-contained page: its curves, its figures, its configuration."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nanochat_ray.train.metrics import VAL_METRICS, duration

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 240, 56, 28

EVALS_START, EVALS_END = "<!-- evals -->", "<!-- end of evals -->"
"""Around what ``eval_report`` writes."""

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:720px;margin:2rem auto;padding:0 1rem;
color:#1c1b19;background:#fcfbf9}h1{font-size:1.3rem}h2{font-size:1rem;margin:1.6rem 0 .3rem}
table{border-collapse:collapse}td{padding:.1rem 1rem .1rem 0;vertical-align:top}
td:first-child{color:#6b6862}svg{width:100%;height:auto}text{font-size:11px;fill:#6b6862}
pre{white-space:pre-wrap;font-size:12px;color:#6b6862}
"""


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two bounds, about four."""
    span = max(high - low, 1e-9)
    step = 10.0 ** np.floor(np.log10(span / 3))
    for factor in (5, 2):
        if span / (step * factor) >= 3:
            step *= factor
            break
    return [float(t) for t in np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step]


def curve(title: str, points: Sequence[tuple[float, float]], *, dots: bool = False) -> str:
    """An SVG of (step, value) pairs, drawn as a line, with dots where they are few."""
    xs, ys = (np.asarray(column, dtype=float) for column in zip(*points, strict=True))
    # The first steps of a loss would flatten all that comes after.
    low, high = float(ys.min()), float(np.quantile(ys, 0.98) if len(ys) > 50 else ys.max())
    pad = 0.05 * max(high - low, 1e-6)
    low, high = low - pad, high + pad
    across = (WIDTH - LEFT - 8) / max(xs.max() - xs.min(), 1)

    def at(x: float, y: float) -> tuple[float, float]:
        up = (min(y, high) - low) / (high - low)
        return LEFT + (x - xs.min()) * across, (HEIGHT - BOTTOM) * (1 - up)

    grid = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{at(0, t)[1]:.1f}" y2="{at(0, t)[1]:.1f}" '
        f'stroke="#e5e2dc"/><text x="{LEFT - 6}" y="{at(0, t)[1] + 4:.1f}" '
        f'text-anchor="end">{t:g}</text>'
        for t in _ticks(low, high)
    )
    labels = "".join(
        f'<text x="{at(t, low)[0]:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{t:g}</text>'
        for t in _ticks(float(xs.min()), float(xs.max()))
    )
    points_xy = [at(x, y) for x, y in zip(xs, ys, strict=True)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points_xy)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#2f6f62"/>' for x, y in points_xy
    )
    return (
        f'<h2>{html.escape(title)}</h2><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}">{grid}{labels}<polyline points="{line}" fill="none" '
        f'stroke="#2f6f62" stroke-width="1.5"/>{marks if dots else ""}</svg>'
    )


CURVES = (
    ("reward", "reward (mean over all sampled answers)"),
    ("groups_with_signal", "groups with different rewards"),
    ("answer_tokens", "tokens of an answer"),
    ("truncated_share", "share of truncated answers"),
    ("entropy", "entropy (nats per sampled token)"),
    ("logprob_diff", "largest difference of log-probabilities, trainer to engine"),
    ("kl", "divergence from the parent (nats per token)"),
    ("rehearsal_loss", "loss of rehearsed conversations (nats per token)"),
    ("rollout_tokens_per_s", "rollout tokens per second"),
    ("loss", "training loss (nats per token)"),
    ("lr_factor", "learning rate (share of the full one)"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_s", "tokens per second"),
    ("mfu", "share of the peak FLOP/s (MFU)"),
)
"""What of the training steps is drawn, with its title."""


def _curves(records: Sequence[dict[str, Any]]) -> list[str]:
    """Validations first, then the training steps; only finite values can be drawn."""

    def points(kind: str, key: str) -> list[tuple[float, float]]:
        pairs = [(r["step"], r.get(key)) for r in records if r["kind"] == kind]
        return [(x, y) for x, y in pairs if isinstance(y, int | float) and math.isfinite(y)]

    curves = [
        (f"validation, {key.replace('_', ' ')}", points("eval", key), True) for key in VAL_METRICS
    ]
    per_task = sorted(
        {k for r in records if r["kind"] == "eval" for k in r if k.startswith("pass@")}
    )
    curves += [(f"validation, {key}", points("eval", key), True) for key in per_task]
    curves += [(title, points("train", key), False) for key, title in CURVES]
    return [curve(title, pairs, dots=dots) for title, pairs, dots in curves if pairs]


def _has_reward(sample: dict[str, Any]) -> bool:
    return isinstance(sample.get("reward"), int | float)


def _samples(records: Sequence[dict[str, Any]]) -> str:
    """What the model wrote at its last validation."""
    texts = [r for r in records if r["kind"] == "sample"]
    cells = "".join(
        f"<tr><td>{html.escape(r['prompt'])}</td><td>{html.escape(r['text'])}</td>"
        + (f"<td>reward {r['reward']:g}</td></tr>" if _has_reward(r) else "</tr>")
        for r in texts
        if r["step"] == texts[-1]["step"]
    )
    return (
        f"<h2>{'Sampled' if _has_reward(texts[-1]) else 'Greedy'} texts after step "
        f"{texts[-1]['step']}</h2><table>{cells}</table>"
        if cells
        else ""
    )


def _table(values: dict[str, Any]) -> str:
    cells = "".join(
        f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>"
        for k, v in values.items()
    )
    return f"<table>{cells}</table>"


def render(
    name: str,
    records: Sequence[dict[str, Any]],
    summary: dict[str, Any],
    *,
    about: dict[str, Any],
    hardware: dict[str, Any],
    evals: str = "",
) -> str:
    """HTML of a run from its metrics' records; ``about`` and ``hardware`` are shown as they are.
    ``evals``: ``eval_report.section``."""
    summary_table = {
        "tokens": f"{summary.get('tokens', 0):,}",
        "time in steps": duration(summary.get("train_seconds", 0.0)),
        "tokens per second": f"{summary.get('tokens_per_s', 0.0):,.0f}",
        "waiting for data": f"{summary.get('data_wait_share', 0.0):.2%}",
        "stall of a checkpoint": f"{summary.get('longest_save_stall_s', 0.0):.3f} s at most",
        **{
            k.replace("_", " "): f"{v:.4f}"
            for k, v in summary.items()
            if k.endswith(("byte", "loss"))
        },
    }
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><title>{html.escape(name)}</title><style>{_STYLE}</style>'
        f"<h1>Run {html.escape(name)}</h1>{_table(summary_table)}{''.join(_curves(records))}"
        f"{EVALS_START}{evals}{EVALS_END}"
        f"{_samples(records)}<h2>Hardware</h2>{_table(hardware)}"
        f"<h2>Configuration</h2><pre>{html.escape(json.dumps(about, indent=1))}</pre></html>\n"
    )
