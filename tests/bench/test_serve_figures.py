"""What ``bench serve`` makes of its figures, and how it starts its systems."""

from __future__ import annotations

from pathlib import Path

import pytest

from nanochat_ray.bench import systems
from nanochat_ray.bench.load import random_prompts
from nanochat_ray.bench.serve import Args
from nanochat_ray.bench.serve_figures import COMPARISONS, medians, ratios, table


def figures(tokens_per_s: float, milliseconds: float) -> dict[str, dict[str, float]]:
    times = dict.fromkeys(COMPARISONS[1:], milliseconds)
    return {"32 greedy": {"tokens_per_s": tokens_per_s, **times}}


FIGURES = {
    "local fp32": figures(100, 8),
    "local int8": figures(400, 2),
    "vllm fp32": figures(50, 16),
    "vllm bf16": figures(200, 1),
}
NAMES = {(name.split()[0], name.split()[1]): name for name in FIGURES}


def test_ratios_compare_equal_precisions_and_best() -> None:
    result = ratios(FIGURES, NAMES, "vllm")["32 greedy"]
    assert set(result) == {"fp32", "best"}
    assert result["fp32"] == {"tokens_per_s": 2.0, **dict.fromkeys(COMPARISONS[1:], 0.5)}
    # int8 against bf16: those with the most tokens/s.
    assert result["best"] == {"tokens_per_s": 2.0, **dict.fromkeys(COMPARISONS[1:], 2.0)}


def test_ratios_need_a_server_of_ours() -> None:
    assert ratios(FIGURES, {("vllm", "fp32"): "vllm fp32"}, "vllm") == {}


def test_the_table_has_one_line_per_system_and_load() -> None:
    head, *lines = table(FIGURES).splitlines()
    assert "tok/s" in head
    assert [line.split()[:4] for line in lines][1] == ["local", "int8", "32", "greedy"]


def test_medians_are_by_figure() -> None:
    runs = [{"tokens_per_s": x, "text": "a"} for x in (1.0, 5.0, 2.0)]
    assert medians(runs) == {"tokens_per_s": 2.0}


def test_prompts_are_spans_of_the_text() -> None:
    text = list(range(1000, 1200))
    prompts = random_prompts(
        20, vocab=10, prompt=16, output=4, spread=0.5, sampling="sampled", text=text
    )
    for prompt in prompts:
        start = prompt.ids[0]
        assert prompt.ids == list(range(start, start + len(prompt.ids)))
        assert 8 <= len(prompt.ids) <= 24
        assert (prompt.temperature, prompt.top_p) == (0.8, 0.95)
    assert len({prompt.ids[0] for prompt in prompts}) > 10
    with pytest.raises(ValueError, match="text has 200 tokens: more than prompt=200"):
        random_prompts(1, vocab=10, prompt=200, output=4, text=text)


def test_vllm_is_started_beside_ours() -> None:
    python = str(Path(systems.__file__))
    args = Args(systems="local,ray", peer_python=[f"vllm={python}"], ours="http://x")
    assert systems.kinds_to_start(args) == ["local", "vllm"]
    command = systems.vllm_command("py", Path("/m"), "bf16", 81)
    assert command[command.index("--dtype") + 1] == "bfloat16"
    with pytest.raises(ValueError, match="systems='x' is not allowed"):
        systems.kinds_to_start(Args(systems="x"))


def test_random_weights_have_no_drafts(tmp_path: Path) -> None:
    from nanochat_ray.bench.load_engine import make_run
    from nanochat_ray.storage import Store

    make_run(run := Store.at(str(tmp_path)).child("runs", "bench"))
    assert systems.num_drafts(run) == 0
    args = Args(storage=str(tmp_path))
    command = systems.our_command(args, "local", "int8", 80)
    assert command[command.index("--engine.num-speculative-tokens") + 1] == "0"
    assert command[command.index("--engine.precision") + 1] == "int8"
