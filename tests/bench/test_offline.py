"""What ``bench offline`` sends to its systems, and what it makes of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanochat_ray.bench.offline import Args, Prompts, compare


class ScriptedSystem:
    """A system of fixed speed, whose sampled tokens are its own."""

    def __init__(self, kind: str, seconds: float, token: int):
        self.kind, self.name, self._seconds, self._token = kind, kind, seconds, token
        self.jobs: list[tuple[int, str]] = []

    def run(
        self, prompts: Prompts, max_tokens: int, sampling: str = "greedy"
    ) -> tuple[float, Prompts]:
        self.jobs.append((len(prompts), sampling))
        token = self._token if sampling == "sampled" else 0
        return self._seconds, [[token] * max_tokens for _ in prompts]


def run(systems: Sequence[ScriptedSystem]) -> dict[str, Any]:
    return compare(systems, 300, (1, 4), prompt_len=3, max_tokens=8, repeats=1)  # type: ignore[arg-type]


def test_greedy_and_sampled_take_turns() -> None:
    ours, peer = ScriptedSystem("nanochat_ray", 0.5, 1), ScriptedSystem("vllm", 1.0, 2)
    result = run([ours, peer])
    # The first round warms up.
    assert ours.jobs == [
        (n, how) for n in (1, 4) for how in ("greedy", "sampled") for _ in range(2)
    ]
    assert result["rates"]["4 sampled"] == {"nanochat_ray": 64.0, "vllm": 32.0}
    assert result["decode_vs_vllm"] == dict.fromkeys(
        ("1 greedy", "1 sampled", "4 greedy", "4 sampled"), 2.0
    )


def test_only_our_own_samples_are_compared() -> None:
    systems = [
        ScriptedSystem("nanochat_ray", 1, 1),
        ScriptedSystem("baseline", 1, 2),
        ScriptedSystem("vllm", 1, 2),
    ]
    assert run(systems)["equal"] == {"baseline": 0.5, "vllm": 1.0}


def test_baseline_must_be_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"baseline=.* a checkout of this repository"):
        Args(baseline=str(tmp_path))
    (tmp_path / "nanochat_ray").mkdir()
    assert Args(baseline=str(tmp_path)).baseline
