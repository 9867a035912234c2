"""The benchmark of rollouts counts tokens, and leaves out the round that warms up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nanochat_ray.bench import rollouts
from nanochat_ray.bench.rollouts import Args, answer_of, measure
from nanochat_ray.cli import rl
from nanochat_ray.rl.rollout import Rollout


def test_medians_of_rounds_behind_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(rollouts.time, "perf_counter", lambda: now)
    monkeypatch.setattr(rollouts.time, "process_time", lambda: now / 2)

    def system(seconds: list[float], num_tokens: list[int]) -> Callable[[int], list[list[int]]]:
        def sample(seed: int) -> list[list[int]]:
            nonlocal now
            now += seconds[seed]
            return [[7] * num_tokens[seed], []]

        return sample

    systems = {
        "a": system([100, 1, 2, 4], [9, 10, 10, 40]),
        "b": system([1, 5, 5, 5], [1, 10, 20, 30]),
    }
    assert measure(systems, 3) == {
        "a": {"seconds": 2, "cpu_seconds": 1, "tokens_per_s": 10, "answer_tokens": 20},
        "b": {"seconds": 5, "cpu_seconds": 2.5, "tokens_per_s": 4, "answer_tokens": 20},
    }


def test_answers_have_no_final_token() -> None:
    logprobs: list[float | None] = [0.0, 0.0]
    assert answer_of(Rollout([5, 9], logprobs, "stop", 0)) == [5]
    assert answer_of(Rollout([5, 9], logprobs, "length", 0)) == [5, 9]


def test_settings_are_those_of_rl() -> None:
    args = Args(nanochat=Path(), questions=3, samples=8, max_tokens=40)
    assert rl.engine_config(args.rl_args()).max_num_seqs == 24
    config = args.rl_args().rl_config()
    assert (config.questions, config.samples, config.max_tokens) == (3, 8, 40)
    with pytest.raises(ValueError, match="samples=1 is not allowed"):
        Args(nanochat=Path(), samples=1, batch=1)


def test_a_batch_must_divide_the_samples() -> None:
    with pytest.raises(ValueError, match="batch=8 is not allowed: a divisor of --samples"):
        Args(nanochat=Path("nanochat"), samples=12)
