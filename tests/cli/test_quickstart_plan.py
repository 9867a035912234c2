"""The plans of a quickstart's stages, computed by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nanochat_ray.cli import quickstart_plan
from nanochat_ray.cli.quickstart_plan import (
    Progress,
    base_minutes,
    measure,
    rl_steps,
    settle,
    sft_epochs,
    sft_minutes,
)
from nanochat_ray.storage import Store
from nanochat_ray.train.metrics import to_jsonl


def at(elapsed_s: float, other_s: float, tokens_per_s: float = 0.0) -> Progress:
    return Progress(elapsed_s=elapsed_s, other_s=other_s, tokens_per_s=tokens_per_s)


@pytest.mark.parametrize(
    ("elapsed_s", "rl_steps", "minutes"),
    [
        # 690 s less 45, 2 minutes of fine-tuning and, with 50 steps of RL, 6.7 times 45: 223.5.
        (45, None, 3.7),
        # Slower: with 50 steps 169.6 s are left, with 20 (5.2 times 52) 247.6. 3.5 minutes do.
        (52, None, 3.5),
        # Slower: with 20 steps 198 s. Slower: 136. Slower: none.
        (60, None, 3.3),
        (70, None, 2.3),
        (100, None, 1.0),
        # A small text, soon prepared: 690 less 10, 120 and 6.7 times 40: 292.
        (10, None, 4.9),
        # The user's number of steps: 6.7, 5.45 and 4.2 times as long as until now.
        (60, 50, 1.8),
        (64, 25, 2.6),
        (60, 0, 4.3),
        (10, 0, 5.2),
    ],
)
def test_base_training_leaves_time_for_the_rest(
    elapsed_s: float, rl_steps: int | None, minutes: float
) -> None:
    assert base_minutes(at(elapsed_s, elapsed_s), rl_steps) == minutes


@pytest.mark.parametrize(
    ("progress", "rl_steps", "epochs"),
    [
        # 690 s less those 300 and 0.95 times 100: 295. At 10,500 tokens/s a pass takes 100 s; 60
        # steps of 19,000 tokens take 108.6 s, 20 of them 36.2 s.
        (at(290, 100, 10_500), None, 2.0),
        (at(350, 100, 10_500), None, 1.4),
        (at(440, 100, 10_500), None, 1.0),
        (at(489, 100, 10_500), None, 0.7),
        (at(530, 100, 10_500), None, 0.5),
        # Slower by a third at the end of base training: 150 s, 162.9 s and 54.3 s.
        (at(350, 100, 7000), None, 1.0),
        (at(440, 100, 7000), None, 0.7),
        # The user's number of steps, for which 50 take 90.5 s.
        (at(440, 100, 10_500), 50, 0.6),
        (at(440, 100, 10_500), 0, 1.6),
        # A fast machine, a slow one.
        (at(250, 60, 21_000), None, 2.0),
        (at(400, 150, 4750), None, 0.5),
        # Base training was complete before, and its log is lost.
        (at(20, 20), None, 1.0),
    ],
)
def test_fine_tuning_takes_the_passes_that_fit(
    progress: Progress, rl_steps: int | None, epochs: float
) -> None:
    assert sft_epochs(progress, rl_steps) == epochs


def test_fine_tuning_has_room_for_a_busy_moment() -> None:
    # 1.25 times as long as base training on 1.4 times 1,050,000 tokens: 175 s.
    assert sft_minutes(at(350, 100, 10_500), 1.4) == 2.9
    assert sft_minutes(at(20, 20), 1.0) is None


@pytest.mark.parametrize(
    ("progress", "steps"),
    [
        # 690 s less those 500 and half of 150, by 2 s for 15,000 tokens: 57.5.
        (at(500, 150, 7500), 57),
        # Slower by a third since base training: 70 s, 3 s each. Faster by a third: 1.5 s.
        (at(535, 170, 5000), 23),
        (at(535, 170, 10_000), 46),
        # A fast machine, and one that is too slow or too late.
        (at(450, 100, 15_000), 60),
        (at(620, 200, 3000), 20),
        (at(700, 200, 7500), 20),
        # Fine-tuning was complete before: nearly all of the time is left, or its log is lost.
        (at(10, 10, 7500), 60),
        (at(10, 10), 50),
    ],
)
def test_rl_takes_the_steps_that_fit(progress: Progress, steps: int) -> None:
    assert rl_steps(progress) == steps


def test_a_run_keeps_the_plan_that_it_was_given(root: Store) -> None:
    late = at(450, 100, 5447.6)
    assert settle(root.child("base"), 3.5, 3.5, late) == (3.5, "")
    remark = ", not 1.0: 4.0 minutes are left, 5,448 tokens/s in the last training"
    assert settle(root.child("chat"), 0.7, 1.0, late) == (0.7, remark)
    # Resumed, whatever is left then.
    assert settle(root.child("chat"), 2.0, 1.0, at(10, 10)) == (0.7, ", as planned before")
    assert settle(root.child("rl"), 20, 50, at(750, 100))[1].startswith(", not 50: 0.0 minutes")
    steps, _ = settle(root.child("rl"), 60, 50, late)
    assert (steps, type(steps)) == (20, int)


def write_steps(run: Store, *steps: tuple[float, float, int]) -> None:
    """Steps of (time, seconds, tokens), and a validation between them."""
    fields = ("loss", "grad_norm", "lr_factor", "data_wait", "tokens_per_s", "steps")
    records = [
        {"kind": "train", "step": i, "time": at, "seconds": seconds, "tokens": tokens}
        | dict.fromkeys(fields, 1)
        for i, (at, seconds, tokens) in enumerate(steps)
    ]
    records.insert(1, {"kind": "eval", "step": 1, "time": 1000.0, "seconds": 50.0})
    run.write_text("metrics.jsonl", to_jsonl(records) + "damaged\n")


def test_progress_is_measured_by_the_runs(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: 150.0, time=lambda: 1100.0)
    monkeypatch.setattr(quickstart_plan, "time", clock)
    base, chat = root.child("base"), root.child("chat")
    assert measure(50.0) == at(100, 100)
    assert measure(50.0, base) == at(100, 100)  # it has no log
    # The first step, at 999, is of an earlier start: this one was at 1000.
    write_steps(base, (999, 7, 10), (1000, 8, 10), (1040, 4, 100), (1041, 6, 200))
    assert measure(50.0, base) == at(100, 82, 30)
    write_steps(chat, (1070, 1, 900), (1080, 9, 30), (1090, 3, 30))
    assert measure(50.0, base, chat) == at(100, 69, 5)
    # A run that another machine has trained before, behind whose clock this one is.
    write_steps(chat, (1070, 120, 900))
    assert measure(50.0, chat) == at(100, 0, 7.5)
