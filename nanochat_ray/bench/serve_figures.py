"""Figures of ``bench serve``: medians, the table, and our ratios to a peer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

OURS = ("ray", "local")
"""Our servers, the one that is compared with a peer first."""
COMPARISONS = ("tokens_per_s", "ttft_p50_ms", "ttft_p99_ms", "itl_p50_ms", "itl_p99_ms")
Figures = Mapping[str, Mapping[str, Mapping[str, float]]]
"""By system and load."""


def load_name(streams: int, sampling: str) -> str:
    return f"{streams} {sampling}"


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = [k for k, v in runs[0].items() if isinstance(v, (int, float))]
    return {name: statistics.median(run[name] for run in runs) for name in numbers}


def table(figures: Figures) -> str:
    columns = ("requests_per_s", "tokens_per_s", "all_tokens_per_s")
    times = [f"{name}_p{share}_ms" for name in ("ttft", "tpot", "itl", "e2e") for share in (50, 99)]
    extra = ("ttft_p90_ms", "itl_p90_ms", "goodput_per_s", "failed")
    lines = []
    for system, by_load in figures.items():
        for load, metrics in by_load.items():
            cells = [f"{metrics[c]:9.1f}" for c in (*columns, *times, *extra) if c in metrics]
            lines.append(f"{system:>12} {load:>11} " + " ".join(cells))
    some = next(iter(next(iter(figures.values())).values()))
    names = [c for c in (*columns, *times, *extra) if c in some]
    short = [
        c.removesuffix("_ms").replace("tokens_per_s", "tok/s").replace("_per_s", "/s")
        for c in names
    ]
    head = f"{'':>12} {'streams':>11} " + " ".join(f"{name:>9}" for name in short)
    return "\n".join([head, *lines])


def ratios(
    figures: Figures, names: Mapping[tuple[str, str], str], peer: str
) -> dict[str, dict[str, dict[str, float]]]:
    """Ours over the peer's by load, precision and figure; "best" compares the precisions with the
    most tokens/s. ``names``: of a system by its kind and precision."""
    ours = next((kind for kind in OURS if any(kind == of for of, _ in names)), None)
    if ours is None:
        return {}
    result: dict[str, dict[str, dict[str, float]]] = {}
    for load in next(iter(figures.values())):

        def best(kind: str, load: str = load) -> str:
            choices = [name for (of, _), name in names.items() if of == kind]
            return max(choices, key=lambda name: figures[name][load]["tokens_per_s"])

        pairs = {
            precision: (names[ours, precision], name)
            for (kind, precision), name in names.items()
            if kind == peer and (ours, precision) in names
        }
        pairs["best"] = best(ours), best(peer)
        result[load] = {
            label: {
                figure: figures[our_name][load][figure] / figures[peer_name][load][figure]
                for figure in COMPARISONS
                if figures[peer_name][load][figure]
            }
            for label, (our_name, peer_name) in pairs.items()
        }
    return result
