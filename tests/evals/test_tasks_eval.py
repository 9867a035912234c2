"""A real engine answers; the score counts what the grader accepts."""

from __future__ import annotations

import threading

import pytest
import torch

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.offline import LocalEngine
from nanochat_ray.evals.results import wilson_interval
from nanochat_ray.evals.tasks import TaskScore, evaluate
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.chat import Message
from tests.tiny import TOKENIZER, tiny_config


class FirstLetter:
    """Right if the answer begins with the letter that the tiny model happens to say."""

    name = "letters"

    def __init__(self, accept: set[int], long: int = -1):
        self.accept, self.long = accept, long
        self.answers: dict[int, str] = {}

    def __len__(self) -> int:
        return 30

    def question(self, index: int) -> list[Message]:
        return [{"role": "user", "content": "x" * (200 if index == self.long else index)}]

    def example(self, index: int) -> list[Message]:
        return [*self.question(index), {"role": "assistant", "content": "y"}]

    def grade(self, index: int, answer: str) -> bool:
        self.answers[index] = answer
        return index in self.accept


def engine() -> LocalEngine:
    model = GPT(tiny_config(sequence_len=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return LocalEngine.from_model(model, TOKENIZER, EngineConfig(max_num_seqs=4, max_queue_size=2))


def test_accuracy_counts_all_questions() -> None:
    task, one_engine = FirstLetter({1, 3, 25}, long=7), engine()
    progress_calls = []
    score = evaluate(
        one_engine,
        TOKENIZER,
        task,
        count=26,
        max_tokens=12,
        progress=lambda d, t: progress_calls.append((d, t)),
    )
    assert (score.correct, score.total, score.too_long) == (3, 26, 1)
    assert len(score.wrong) == 10
    assert progress_calls[-1] == (26, 26)
    assert task.answers[7] == ""  # it does not fit into the context: asked, not answered, wrong
    assert any(task.answers.values())
    again = FirstLetter({1})
    evaluate(one_engine, TOKENIZER, again, count=5, max_tokens=12)
    assert all(again.answers[i] == task.answers[i] for i in range(5))


def test_answers_are_graded_at_once() -> None:
    class Meeting(FirstLetter):
        barrier = threading.Barrier(4, timeout=60)

        def grade(self, index: int, answer: str) -> bool:
            self.barrier.wait()
            return index == 1

    score = evaluate(
        engine(), TOKENIZER, Meeting(set()), count=2, samples=2, max_tokens=4, grade_threads=4
    )
    assert score.num_right == [0, 2]


def test_one_thread_is_the_callers() -> None:
    """Where a grader may set an alarm."""

    class Main(FirstLetter):
        def grade(self, index: int, answer: str) -> bool:
            return threading.current_thread() is threading.main_thread()

    assert evaluate(engine(), TOKENIZER, Main(set()), count=2, max_tokens=4).num_right == [1, 1]


def test_a_part_of_a_reward_is_not_right() -> None:
    class Partial(FirstLetter):
        def grade(self, index: int, answer: str) -> float:  # type: ignore[override]
            return index / 4

    assert evaluate(engine(), TOKENIZER, Partial(set()), count=6, max_tokens=4).num_right == [
        *([0] * 4),
        *([1] * 2),
    ]


def test_previous_answers_are_not_asked_again() -> None:
    answers: dict[str, str] = {}
    whole = evaluate(
        engine(),
        TOKENIZER,
        FirstLetter({1, 3}),
        count=6,
        max_tokens=12,
        on_answer=answers.__setitem__,
    )
    assert sorted(answers) == [f"{i}/0" for i in range(6)]
    task = FirstLetter({1, 3})
    others: dict[str, str] = {}
    rest = evaluate(
        engine(),
        TOKENIZER,
        task,
        count=6,
        max_tokens=12,
        previous_answers={"0/0": "a", "4/0": answers["4/0"]},
        on_answer=others.__setitem__,
    )
    assert others == {key: text for key, text in answers.items() if key not in ("0/0", "4/0")}
    assert task.answers == {i: "a" if i == 0 else answers[f"{i}/0"] for i in range(6)}
    assert rest.num_right == whole.num_right


def test_pass_at_k_by_hand() -> None:
    """Of 4 answers 0, 1 and 4 are right: pass@2 is 0, 1 - C(3, 2) / C(4, 2) = 1/2, and 1."""
    score = TaskScore("x", [0, 1, 4], 4, [])
    assert score.accuracy == pytest.approx((0 + 1 / 4 + 1) / 3)
    assert score.pass_at(2) == pytest.approx((0 + 1 / 2 + 1) / 3)
    assert score.pass_at(4) == pytest.approx(2 / 3)
    assert [TaskScore("x", num_right, 1, []).accuracy for num_right in ([], [1], [1, 0])] == [
        0,
        1,
        1 / 2,
    ]
    # The standard deviation of (1/4, 1/2, 3/4) is 1/4, and 1.96 / 4 / sqrt(3) is 0.2829.
    interval = TaskScore("x", [1, 2, 3], 4, []).interval()
    assert interval == pytest.approx((0.5 - 0.2829, 0.5 + 0.2829), abs=1e-4)
    # None of 10 questions: 1.96² / (10 + 1.96²).
    assert TaskScore("x", [0] * 10, 4, []).interval() == pytest.approx((0, 0.27754), abs=1e-5)
    # A third of each, which no float is.
    for count in (1, 50):
        alike = TaskScore("x", [1] * count, 3, []).interval()
        assert alike == pytest.approx(wilson_interval(count / 3, count))


def test_samples_differ_and_are_repeatable() -> None:
    class Collect(FirstLetter):
        def grade(self, index: int, answer: str) -> bool:
            texts.append(answer)
            return answer == texts[0]

    runs = []
    for seed in (0, 0, 1):
        texts: list[str] = []
        score = evaluate(
            engine(), TOKENIZER, Collect(set()), count=3, samples=4, temperature=1.0, seed=seed
        )
        assert (score.total, len(texts)) == (3, 12)
        assert score.num_right[0] >= 1
        runs.append(texts)
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert len(set(runs[0])) > 3
