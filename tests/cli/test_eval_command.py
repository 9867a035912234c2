"""What ``nanochat-ray eval`` prints of a task, and which device, checkpoints and tasks it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanochat_ray.cli import eval as command
from nanochat_ray.cli.eval_tasks import _print
from nanochat_ray.cli.parse import parse

FIGURES: dict[str, Any] = {
    "correct": 3,
    "total": 4,
    "accuracy": 0.375,
    "pass@2": 0.5,
    "interval": [0.1, 0.7],
    "too_long": 0,
    "wrong": [("1+1", "3"), ("1+2", "4"), ("1+3", "5")],
}


@pytest.mark.parametrize(
    ("flags", "changes", "seconds", "notes"),
    [
        ({}, {}, 2.0, ", in 2.0 s"),
        ({}, {}, None, ", measured before"),
        ({"count": 5}, {}, 2.0, ", in 2.0 s; the task has no more than 4 questions"),
        ({}, {"too_long": 1}, 2.0, "; 1 do not fit into the context and count as wrong"),
        ({"samples": 2}, {}, 2.0, ", in 2.0 s; pass@2 50.0%"),
    ],
)
def test_a_task_is_one_line(
    capsys: pytest.CaptureFixture[str],
    flags: dict[str, Any],
    changes: dict[str, Any],
    seconds: float | None,
    notes: str,
) -> None:
    args = command.Args(**{"count": 4, "show_wrong": 2, **flags})
    _print("sums", {**FIGURES, **changes}, args, seconds)
    line, *wrong_answers = capsys.readouterr().out.splitlines()
    start = f"sums               3/{4 * args.samples} right (37.5%, 95% interval 10.0% to 70.0%)"
    assert line.startswith(start)
    assert line.endswith(notes)
    assert wrong_answers == ["    wrong: '1+1' → '3'", "    wrong: '1+2' → '4'"]


def test_several_answers_are_sampled() -> None:
    flags: list[dict[str, Any]] = [{}, {"samples": 2}, {"samples": 2, "temperature": 0.0}]
    assert [command.Args(**each).temperature for each in flags] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("name", "count", "is_allowed"),
    [
        *(("cpu", 0, True), ("cuda", 1, True), ("cuda:0", 1, True), ("cuda:1", 2, True)),
        *(("cuda", 0, False), ("cuda:1", 1, False), ("cpu:0", 1, False), ("cuda:", 1, False)),
    ],
)
def test_a_device_must_be_there(
    monkeypatch: pytest.MonkeyPatch, name: str, count: int, is_allowed: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if is_allowed:
        command.Args(device=name)
    else:
        with pytest.raises(ValueError, match=f"device='{name}' is not allowed: cpu, or cuda"):
            command.Args(device=name)


def test_flags_to_their_bounds() -> None:
    """The least that each allows, from the command line."""
    least = {"count": 1, "samples": 1, "max_tokens": 1, "seed": 0, "threads": 0, "show_wrong": 0}
    least |= {"text_tokens": 0, "core_count": 0, "temperature": 0}
    words = [
        w for name, value in least.items() for w in (f"--{name.replace('_', '-')}", str(value))
    ]
    args = parse(command.Args, None, words)
    assert {name: getattr(args, name) for name in least} == least
    for name, value in least.items():
        if name != "core_count":
            with pytest.raises(ValueError, match=f"{name}=-?[01]"):
                command.Args(**{name: value - 1})  # type: ignore[arg-type]
    for names in ({"text": ("a", "")}, {"run": "a/b"}, {"checkpoint": "a/b"}):
        with pytest.raises(ValueError, match=f"{next(iter(names))}="):
            command.Args(**names)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="count=1073741825"):
        command.Args(count=(1 << 30) + 1)


def test_tasks_get_their_size_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "make_task", lambda *args, **options: (*args, options))
    tasks = command.make_tasks(command.Args(count=7, seed=5), ["a", "b"])
    assert tasks == [(name, "test", {"size": 7, "seed": 5}) for name in "ab"]  # type: ignore[comparison-overlap]
