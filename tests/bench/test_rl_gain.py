"""The gain of RL over seeds, from commands whose results are known."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nanochat_ray.bench import rl_gain
from nanochat_ray.bench.rl_gain import NEW_TASKS, OLD_TASKS, TRANSFER_TASK, Args, Gain


def test_tasks_are_those_of_the_defaults() -> None:
    assert len(NEW_TASKS) == 5
    assert {"chain_sum", "stories", "identity"} <= set(OLD_TASKS)
    assert not {*NEW_TASKS, TRANSFER_TASK} & set(OLD_TASKS)


def test_figures_of_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, ...]] = []

    def run(command: str, args: Args, *flags: str) -> dict[str, Any]:
        calls.append((command, *flags))
        if command == "eval":
            return {
                "accuracy": {**dict.fromkeys(OLD_TASKS, 1.0), "stories": 0.97, TRANSFER_TASK: 0.8}
            }
        before = {f"first_pass@1/{task}": 0.2 for task in NEW_TASKS}
        return {**before, **{f"pass@1/{task}": i / 5 for i, task in enumerate(NEW_TASKS)}}

    monkeypatch.setattr(rl_gain, "last_object", run)
    gain = rl_gain.measure(Args(steps=3, flags="--rl.kl 0.5"), 7)
    accuracy = {**dict.fromkeys(OLD_TASKS, 1.0), "stories": 0.97, TRANSFER_TASK: 0.8}
    assert gain == Gain(7, pytest.approx(0.2), pytest.approx(0.4), accuracy)
    rl, evaluation = calls
    assert rl[:4] == ("rl", "--run", "gain-7", "--no-ray")
    assert rl[-4:] == ("--seed", "7", "--rl.kl", "0.5")
    assert evaluation[-1] == TRANSFER_TASK


def test_the_last_line_is_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rl_gain, "PROGRAM", ("echo", "step 1\n"))
    with pytest.raises(json.JSONDecodeError):
        rl_gain.last_object("rl", Args())
    program = ("sh", "-c", 'echo "step 1"; echo "{\\"run\\": \\"$1\\"}"')
    monkeypatch.setattr(rl_gain, "PROGRAM", (*program, "sh"))
    assert rl_gain.last_object("rl", Args()) == {"run": "rl"}


def test_a_row_for_each_task_and_the_spread() -> None:
    gains = [Gain(seed, 0.3, 0.8 + seed / 10, {"identity": 0.98 + seed / 50}) for seed in (0, 1)]
    assert rl_gain.table({"identity": 0.97}, gains).splitlines() == [
        "| percent | before | seed 0 | seed 1 | mean ± deviation |",
        "|---|---|---|---|---|",
        "| new tasks, pass@1 | 30.0 | 80.0 | 90.0 | 85.0 ± 7.1 |",
        "| identity | 97.0 | 98.0 | 100.0 | 99.0 ± 1.4 |",
    ]
    assert rl_gain.table({}, gains[:1]).endswith("| new tasks, pass@1 | 30.0 | 80.0 | 80.0 |")


def test_the_parent_is_measured_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rl_gain, "accuracies", lambda args, run: {"identity": float(run == "chat")})
    monkeypatch.setattr(
        rl_gain, "measure", lambda args, seed: Gain(seed, 0.5, 1.0, {"identity": 0.75})
    )
    rl_gain.main(Args(seeds=(3,)))
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["before"] == {"identity": 1.0}
    assert last["seeds"] == [
        {"seed": 3, "before": 0.5, "after": 1.0, "accuracy": {"identity": 0.75}}
    ]


@pytest.mark.parametrize("values", [{"steps": 0}, {"count": 0}, {"seeds": (-1,)}, {"parent": ""}])
def test_wrong_values_are_named(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(values))}|name"):
        Args(**values)
