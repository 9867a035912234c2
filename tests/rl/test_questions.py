"""The order of questions: every question once per epoch, turns by weight, a state that resumes."""

from __future__ import annotations

import json

import pytest

from nanochat_ray.rl.questions import Curriculum, Question


def test_each_question_once_per_epoch() -> None:
    curriculum = Curriculum([7], seed=3, adaptive=False)
    epochs = [[q.example for q in curriculum.draw(7)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_recorded_questions() -> None:
    """Runs must stay reproducible: the order within a task is that of its own key."""
    questions = Curriculum([7, 5], 3, adaptive=False).draw(14)
    assert [q.example for q in questions if q.task == 0] == [3, 2, 1, 0, 5, 6, 4]
    assert [q.example for q in questions if q.task == 1] == [2, 3, 0, 1, 4, 2, 3]


def test_tasks_take_turns() -> None:
    drawn_tasks = [q.task for q in Curriculum([50, 50, 50], 0, adaptive=False).draw(9)]
    assert drawn_tasks == [0, 1, 2] * 3


def test_turns_follow_wrong_answers() -> None:
    curriculum = Curriculum([99, 99], 0, adaptive=True)
    questions = [Question(0, 0), Question(0, 1), Question(1, 0), Question(1, 1)]
    curriculum.observe(questions, [1.0, 0.5, 0.0, 0.0])
    # 1 - 0.2 · 0.75, and 1.
    assert curriculum.weights() == pytest.approx([0.85, 1.0])
    curriculum.observe(questions[:1], [0.5])
    # 0.15 + 0.2 · (0.5 - 0.15); the other task was not asked.
    assert curriculum.weights() == pytest.approx([1 - 0.22, 1.0])
    for _ in range(60):
        curriculum.observe(questions, [1.0, 1.0, 0.0, 0.0])
    assert curriculum.weights() == pytest.approx([0.1, 1.0])  # the floor
    tasks = [q.task for q in curriculum.draw(110)]
    assert 9 <= tasks.count(0) <= 11


def test_state_continues_the_order() -> None:
    whole, first = (Curriculum([11, 5], 1, adaptive=True) for _ in range(2))
    for curriculum in (whole, first):
        questions = curriculum.draw(6)
        curriculum.observe(questions, [q.example / 11 for q in questions])
    second = Curriculum([11, 5], 1, adaptive=True)
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.draw(20) == whole.draw(20)
