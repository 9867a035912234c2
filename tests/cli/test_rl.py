"""``nanochat-ray rl`` as a person runs it."""

from __future__ import annotations

import json

import pytest

from nanochat_ray.cli import rl
from nanochat_ray.storage import Store
from tests.rl.tiny_rl import TASK, save_parent


@pytest.mark.slow
def test_two_steps_and_a_report(root: Store, capsys: pytest.CaptureFixture[str]) -> None:
    save_parent(root)
    flags = {"questions": 3, "samples": 4, "max_tokens": 4, "truncation": "grade", "pool": 9}
    args = rl.Args(
        storage=root.uri,
        tasks=(TASK,),
        steps=2,
        ray=False,
        rl=flags,
        train={"seed": 1},
    )
    assert rl.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    (first,) = (line for line in lines if line.startswith("step 1/2"))
    for figure in ("reward", "signal", "|Δlogp|", "rollout tokens/s", "entropy", "truncated"):
        assert figure in first
    result = json.loads(lines[-1])
    assert "pass@1 on new questions, before → after" in lines
    assert (result["run"], result["step"], result["done"]) == ("rl", 2, True)
    report = root.child("runs", "rl").read_text("report.html")
    for title in ("reward (mean over", "validation, pass@1", "Sampled texts after step 2"):
        assert title in report
    assert rl.main(args) == 0  # complete: nothing to do


def test_gain_of_each_task() -> None:
    result = {"first_pass@1/a": 0.25, "pass@1/a": 0.5, "first_pass@1": 0.25, "pass@1": 1.0}
    assert [line.split() for line in rl.gain_lines(result, ("a", "b"))[1:]] == [
        ["a", "25.0%", "→", "50.0%"],
        ["mean", "of", "the", "tasks", "25.0%", "→", "100.0%"],
    ]
    assert rl.gain_lines({"pass@1": 0.5}, ("a",)) == []  # validated once


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"run": "chat"}, "run='chat' is not allowed: another run than --parent"),
        ({"rl": {"samples": 1}}, "samples=1 is not allowed: a whole number from 2"),
        ({"rl": {"loss": "ppo"}}, "loss='ppo' is not allowed"),
        ({"tasks": ("products", "products")}, "tasks='products' is not allowed: each task once"),
        ({"steps": 0}, "steps=0 is not allowed"),
        ({"endpoint": "app", "engines": 2}, "engines=2 is not allowed: not with --endpoint"),
        ({"endpoint": "app", "ray": False}, "endpoint='app' is not allowed: not with --no-ray"),
    ],
)
def test_wrong_values_are_named(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rl.Args(**values)


def test_questions_that_do_not_fit(root: Store) -> None:
    save_parent(root)
    args = rl.Args(storage=root.uri, tasks=(TASK,), ray=False, rl={"max_tokens": 45})
    with pytest.raises(ValueError, match="max_tokens=45 is not allowed: the longest question has"):
        rl.main(args)
    with pytest.raises(ValueError, match="parent='nobody' has no checkpoint"):
        rl.main(rl.Args(storage=root.uri, parent="nobody"))
