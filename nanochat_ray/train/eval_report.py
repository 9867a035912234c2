"""What ``nanochat-ray eval`` measured of a run, as a section of its ``report.html``."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

from nanochat_ray.checkpoint.checkpoint import step_of
from nanochat_ray.storage import Store
from nanochat_ray.train.report import EVALS_END, EVALS_START, curve

TITLES = {
    "tasks": ("accuracy", "share of right answers"),
    "core": ("centered", "CORE, centered accuracy"),
    "text": ("bits_per_byte", "bits per byte"),
}
"""Group of figures → the one that is drawn, and its title."""
_Figures = Mapping[int, Mapping[str, Any]]


def read_figures(run: Store) -> dict[int, dict[str, Any]]:
    """Figures of each checkpoint that was measured, by its step. Damaged files are left out: the
    command that wrote them names them."""
    figures = {}
    for file in run.list("evals") if run.exists("evals") else []:
        if re.fullmatch(r"step-\d+\.json", file):
            try:
                content = json.loads(run.child("evals").read_text(file))
            except ValueError:
                continue
            if isinstance(content, dict):
                figures[step_of(file.removesuffix(".json"))] = content
    return dict(sorted(figures.items()))


def section(figures: _Figures) -> str:
    """HTML: of each measurement a curve over the checkpoints, if there are several, and a table."""
    names = {
        (group, name): None
        for content in figures.values()
        for group in TITLES
        for name in content.get(group, {})
    }
    parts, rows = [], []
    for group, name in names:
        key, title = TITLES[group]
        entries = {
            step: content[group][name]
            for step, content in figures.items()
            if name in content.get(group, {})
        }
        if len(entries) > 1:
            points = [(float(step), float(entry[key])) for step, entry in entries.items()]
            parts.append(curve(f"{name}: {title}", points, dots=True))
        rows += [_row(name, step, entry, key) for step, entry in entries.items()]
    if not rows:
        return ""
    return f"<h2>Evaluations</h2>{''.join(parts)}<table>{''.join(rows)}</table>"


def _row(name: str, step: int, entry: Mapping[str, Any], key: str) -> str:
    cells = [name, f"step {step}", f"{key.replace('_', ' ')} {entry[key]:.4f}"]
    if interval := entry.get("interval"):
        cells.append(f"95% interval {interval[0]:.3f} to {interval[1]:.3f}")
    if "total" in entry:
        cells.append(f"{entry['total']:,} questions")
    cells += [f"{k} {v:.4f}" for k, v in entry.items() if k.startswith("pass@") and k != "pass@1"]
    return f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"


def update(run: Store) -> None:
    """Puts the figures of ``evals/`` into the run's page, or makes a page of them alone."""
    text = f"{EVALS_START}{section(read_figures(run))}{EVALS_END}"
    page = run.read_text("report.html") if run.exists("report.html") else ""
    before, start, rest = page.partition(EVALS_START)
    _, end, after = rest.partition(EVALS_END)
    if start and end:
        run.write_text("report.html", before + text + after)
    elif not page:
        name = html.escape(run.root.rpartition("/")[2])
        head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{name}</title>'
        run.write_text("report.html", f"{head}<h1>Run {name}</h1>{text}</html>\n")
    else:  # written before there were evaluations on it
        body = page.rstrip().removesuffix("</html>")
        run.write_text("report.html", f"{body}{text}</html>\n")
