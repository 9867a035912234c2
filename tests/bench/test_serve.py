"""Rounds of the serving benchmark."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat_ray.bench import load, serve
from nanochat_ray.bench.systems import System


def test_warmup_is_a_whole_round(monkeypatch: pytest.MonkeyPatch) -> None:
    rounds: list[tuple[str, int, list[load.Prompt]]] = []

    def run(
        system: System, args: serve.Args, prompts: list[load.Prompt], concurrency: int
    ) -> dict[str, Any]:
        rounds.append((system.kind, concurrency, prompts))
        return {"tokens_per_s": float(len(rounds))}

    monkeypatch.setattr(System, "run", run)
    args = serve.Args(concurrency=(2, 20), requests=3, repeats=1, prompt=4, output=2)
    figures = serve.measure_http(args, [System("ours", ""), System("theirs", "")], [])
    each = [("ours", 2, 8), ("theirs", 2, 8), ("ours", 20, 60), ("theirs", 20, 60)]
    order = [each[i] for i in (1, 0, 3, 2)] + each
    assert [(kind, streams, len(prompts)) for kind, streams, prompts in rounds] == order
    assert rounds[0][2] == rounds[1][2] != rounds[4][2]  # none is in a prefix cache
    rates = {name: value["tokens_per_s"] for name, value in figures["ours"].items()}
    assert rates == {"2 greedy": 5.0, "20 greedy": 7.0}
