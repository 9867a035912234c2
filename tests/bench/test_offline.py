"""What ``bench offline`` sends to its systems, and what it makes of their answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nanochat_ray.bench.llama_cpp_peer import _mlp_width, _tensors
from nanochat_ray.bench.offline import Args, Load, Prompts, PromptSource, compare

LOADS = [Load(n, 3, 9, how) for n in (1, 4) for how in ("greedy", "sampled")]


class ScriptedSystem:
    """Takes ``seconds`` for each token of an answer; its sampled tokens are its own."""

    def __init__(
        self, kind: str, seconds: float, token: int, precision: str = "fp32", drafts: int = 0
    ):
        self.kind, self.precision, self.num_drafts = kind, precision, drafts
        self.name = f"{kind} {precision} {drafts}"
        self._seconds, self._token = seconds, token
        self.jobs: list[tuple[int, int, str]] = []

    def run(
        self, prompts: Prompts, max_tokens: int, sampling: str = "greedy"
    ) -> tuple[float, Prompts]:
        self.jobs.append((len(prompts), max_tokens, sampling))
        token = self._token if sampling == "sampled" else 0
        return self._seconds * max_tokens, [[token] * max_tokens for _ in prompts]


def run(systems: Sequence[ScriptedSystem], loads: Sequence[Load] = LOADS) -> dict[str, Any]:
    return compare(systems, PromptSource(300), loads, repeats=1)  # type: ignore[arg-type]


def test_greedy_and_sampled_take_turns() -> None:
    ours, peer = ScriptedSystem("nanochat_ray", 0.5, 1), ScriptedSystem("vllm", 1.0, 2)
    result = run([ours, peer])
    # The first round warms up; each has a job of the prompts alone.
    assert ours.jobs == [
        (n, tokens, how)
        for n in (1, 4)
        for how in ("greedy", "sampled")
        for _ in range(2)
        for tokens in (1, 9)
    ]
    # 4 sequences of 8 tokens behind the first, in 8 times 0.5 or 1 seconds.
    assert result["rates"]["4 sampled decode"] == {"nanochat_ray fp32 0": 8.0, "vllm fp32 0": 4.0}
    assert result["ours_vs_vllm"]["1 greedy decode"] == {"fp32": 2.0, "best": 2.0}


def test_a_prefill_is_one_token_of_one_prompt() -> None:
    ours = ScriptedSystem("nanochat_ray", 0.5, 1)
    result = run([ours], [Load(1, 200, 1, "greedy")])
    assert ours.jobs == [(1, 1, "greedy")] * 2
    assert result["rates"] == {"prefill 200": {"nanochat_ray fp32 0": 400.0}}


def test_ratios_are_by_precision_drafts_and_best() -> None:
    systems = [
        ScriptedSystem("nanochat_ray", 1.0, 1),
        ScriptedSystem("nanochat_ray", 0.5, 1, "int8"),
        ScriptedSystem("nanochat_ray", 0.25, 1, "int8", 3),
        ScriptedSystem("llama.cpp", 2.0, 1),
        ScriptedSystem("llama.cpp", 0.125, 1, "bf16"),
    ]
    result = run(systems, LOADS[:1])
    assert result["ours_vs_llama.cpp"]["1 greedy decode"] == {"fp32": 2.0, "best": 0.5}
    systems[-1].precision = "int8"
    result = run(systems, LOADS[:1])
    assert result["ours_vs_llama.cpp"]["1 greedy decode"] == {
        "fp32": 2.0,
        "int8": 0.25,
        "int8, drafts": 0.5,
        "best": 0.5,
    }


def test_only_our_own_samples_are_compared() -> None:
    systems = [
        ScriptedSystem("nanochat_ray", 1, 1),
        ScriptedSystem("baseline", 1, 2),
        ScriptedSystem("vllm", 1, 2),
    ]
    assert run(systems)["equal"] == {"baseline fp32 0": 0.5, "vllm fp32 0": 1.0}


def test_baseline_must_be_a_checkout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"baseline=.* a checkout of this repository"):
        Args(baseline=str(tmp_path))
    (tmp_path / "nanochat_ray").mkdir()
    assert Args(baseline=str(tmp_path)).baseline


def test_drafts_need_a_trained_run() -> None:
    with pytest.raises(ValueError, match=r"num_drafts=\(0, 3\) is not allowed"):
        Args(num_drafts=(0, 3))
    assert Args(num_drafts=(0, 3), storage="x", run="c6").run


def test_the_llama_is_as_large_as_the_model() -> None:
    config = {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "vocab_size": 4096,
        "num_hidden_layers": 2,
        "intermediate_size": 4 * 384,
    }
    assert _mlp_width(config) == 1024
    matrices = [shape for _, shape in _tensors(config) if len(shape) == 2]
    # Embedding and head, and of each layer 4 of attention and 2 of 4 times the width.
    size = 2 * 4096 * 384 + 2 * (4 + 8) * 384 * 384
    assert sum(rows * columns for rows, columns in matrices) == size
