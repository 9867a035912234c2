"""Validation and grading of a policy whose answers are known."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from collections.abc import Callable
from typing import Any

import pytest

from nanochat_ray.model.gpt import GPT
from nanochat_ray.rl.losses import PolicyLoss
from nanochat_ray.rl.questions import Question
from nanochat_ray.rl.rollout import Group, Rollout, rollout_seed
from nanochat_ray.rl.source import EVAL_STEP, RolloutSource
from nanochat_ray.storage import Store
from nanochat_ray.tasks.registry import make_tasks
from nanochat_ray.text.chat import tool_delimiters
from nanochat_ray.train.ranks import Ranks
from tests.rl.tiny_rl import ENGINE, RL, TASK, EvenFirst, FakeEngine, job, save_parent
from tests.tiny import TOKENIZER, tiny_config

END = TOKENIZER.special("<|assistant_end|>")
# Right is an even first letter. Two tasks of two questions, three answers to each.
ANSWERS = ["B", "C", "C", "C", "C", "C", "B", "D", "F", "C", "B", "C"]
OTHER = f"{TASK},extra=x"


def script() -> FakeEngine:
    """Gives ``ANSWERS``, the first one to the first request."""
    return FakeEngine(lambda number, _: ([ord(ANSWERS[number]), END], [-1.0, -1.0], "stop"))


def make_source(root: Store, engine: FakeEngine, **changes: Any) -> RolloutSource:
    save_parent(root)
    fields = {"tasks": (TASK, OTHER), "truncation": "wrong", **changes}
    train = {name: fields.pop(name) for name in ("precision",) if name in fields}
    rl = dataclasses.replace(RL, **fields)
    config = job(root, "run", rl=rl)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **train))
    source = RolloutSource(config, rl, ENGINE, lambda *_: engine)
    source.setup(GPT(tiny_config(sequence_len=48)), Ranks())
    return source


def test_pass_at_k_by_hand(root: Store) -> None:
    engine = script()
    source = make_source(root, engine)
    figures = source.evaluate(source.model)
    assert figures == {
        # One of six and four of six right; each task counts alike.
        "error_rate": pytest.approx(7 / 12),
        "pass@1": pytest.approx(5 / 12),
        "pass@3": pytest.approx(3 / 4),  # one of two questions, and both
        f"pass@1/{TASK}": pytest.approx(1 / 6),
        f"pass@1/{OTHER}": pytest.approx(4 / 6),
    }
    assert source.samples(source.model) == [
        {"prompt": "va 0", "text": "B", "reward": 1.0},
        {"prompt": "vax 0", "text": "B", "reward": 1.0},
    ]
    assert engine.versions == [0]
    # Seed of the run, "validation", number of the question, task, index, sample.
    assert [r.params.seed for r in engine.requests] == [
        rollout_seed(0, EVAL_STEP, number, number // 2, number % 2, sample)
        for number in range(4)
        for sample in range(3)
    ]
    params = engine.requests[0].params
    assert (params.temperature, params.max_tokens, params.logprobs) == (1.0, 4, 0)
    assert params.eos_ids == (END, TOKENIZER.bos)


def test_a_question_that_comes_again_has_new_seeds(root: Store) -> None:
    engine = script()
    source = make_source(root, engine)
    engine.load(0, {})
    question = Question(1, 0)
    source.sampler.sample(source.questions, [question] * 2, samples=2, step=7, first=5)
    # Seed of the run, step, number of the question within the step, task, index, sample.
    seeds = [rollout_seed(0, 7, number, 1, 0, sample) for number in (5, 6) for sample in (0, 1)]
    assert [r.params.seed for r in engine.requests] == seeds


def test_samples_show_calls_of_tools(root: Store) -> None:
    ids = tool_delimiters(TOKENIZER)
    call = [ids.call_start, *b"1+1", ids.call_end, ids.result_start, *b"2", ids.result_end]
    answer = [*call, *b"D", END]
    source = make_source(root, FakeEngine(lambda *_: (answer, [-1.0] * len(answer), "stop")))
    source.evaluate(source.model)
    (sample, _) = source.samples(source.model)
    assert (sample["text"], sample["reward"]) == ("[1+1 = 2] D", 1.0)


@pytest.mark.parametrize(
    ("truncation", "golden"), [("wrong", [1, 0, 0]), ("grade", [1, 1, 0]), ("mask", [1, 1, 0])]
)
def test_truncated_answers_are_graded(root: Store, truncation: str, golden: list[float]) -> None:
    source = make_source(root, script(), truncation=truncation)
    rollouts = [
        Rollout([ord("B"), END], [-1.0, -1.0], "stop", 0),
        Rollout([ord("B"), ord("B")], [-1.0, -1.0], "length", 0),
        Rollout([ord("C"), END], [-1.0, -1.0], "stop", 0),
    ]
    assert source.sampler.grade(source.questions.tasks[0], 0, rollouts) == golden


def test_a_reward_is_a_number(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(root, script())
    monkeypatch.setattr("tests.rl.tiny_rl.EvenFirst.grade", lambda *_: math.nan)
    with pytest.raises(ValueError, match="with nan: a bool or a finite"):
        source.evaluate(source.model)


@pytest.mark.parametrize(
    ("changes", "bound"),
    [
        ({}, 1e-4),
        ({"stale": 1}, 0.0),
        ({"precision": "bf16"}, 0.0),
        ({"max_logprob_diff": 0.25}, 0.25),
        ({"max_logprob_diff": 0.25, "stale": 1}, 0.25),
        ({"max_logprob_diff": 0.0}, 0.0),
    ],
)
def test_the_bound_of_a_run(root: Store, changes: dict[str, Any], bound: float) -> None:
    objective = make_source(root, script(), **changes).objective
    assert isinstance(objective, PolicyLoss)
    assert objective.max_diff == bound
    assert objective.reference is None


def test_kl_is_to_the_parents_weights(root: Store) -> None:
    source = make_source(root, script(), kl=0.5)
    assert isinstance(source.objective, PolicyLoss)
    reference = source.objective.reference
    assert reference is not None
    assert not reference.training
    assert not any(p.requires_grad for p in reference.parameters())
    # The policy of this test is another one.
    assert reference.wte.weight.std() > 0.5
    assert not source.model.wte.weight.any()


def test_tasks_have_the_questions_of_their_split(root: Store) -> None:
    source = make_source(root, script())
    assert source.questions.sizes == [12, 12]
    assert source.val_questions.sizes == [2, 2]
    with pytest.raises(ValueError, match=r"has no questions in the split val"):
        make_tasks(("tests.rl.test_evaluate.Empty",), "val", 3, 0)


class Empty(EvenFirst):
    """A task without questions."""

    def __len__(self) -> int:
        return 0


def test_grades_below_zero_may_teach(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a distance does; only where they are all alike there is nothing to learn."""
    monkeypatch.setattr("nanochat_ray.rl.source.MAX_STEPS_WITHOUT_REWARD", 1)
    source = make_source(root, script())
    rollout = Rollout([ord("B"), END], [-1.0, -1.0], "stop", 0)
    groups = [
        Group(Question(0, 0), [0], [rollout] * 2, rewards) for rewards in ([-1, -1], [-2, -1])
    ]
    source._check_rewards(groups)
    with pytest.raises(ValueError, match="no answer of the last 1 steps is right"):
        source._check_rewards(groups[:1])


class OneOfTwo:
    """``Ranks`` of the first of two ranks, whose peer has given each of its answers 0.25."""

    rank, world = 0, 2

    def run_together(self, work: Callable[[], Any]) -> Any:
        return work()

    def gather(self, data: bytes) -> list[bytes]:
        shares = [[rollouts, [0.25] * len(rewards)] for rollouts, rewards in json.loads(data)]
        return [data, json.dumps(shares).encode()]


def test_a_rank_grades_its_share_alone(root: Store) -> None:
    """Another grade of the same answer on another rank would give its batch other weights."""
    source = make_source(root, script())
    sampler, questions = source.sampler, source.questions
    sampler.ranks = OneOfTwo()  # type: ignore[assignment]
    sampler.engine.load(0, {})
    asked_questions = [Question(0, 0), Question(0, 1), Question(1, 0), Question(1, 1)]
    groups = sampler.sample(questions, asked_questions, samples=3, step=0)
    assert [group.question for group in groups] == asked_questions
    quarter = [0.25] * 3
    assert [group.rewards for group in groups] == [[1, 0, 0], quarter, [0, 0, 0], quarter]


def test_one_thread_is_the_callers(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(root, script())
    own_thread = threading.current_thread()
    monkeypatch.setattr(EvenFirst, "grade", lambda *_: threading.current_thread() is own_thread)
    assert source.evaluate(source.model)["pass@1"] == 1


def test_groups_are_graded_at_once(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_source(root, script(), grade_threads=4)
    meeting = threading.Barrier(3, timeout=60)

    def grade(task: EvenFirst, index: int, answer: str) -> bool:
        if answer == "C":  # once in each of three groups
            meeting.wait()
        return answer == "B"

    monkeypatch.setattr(EvenFirst, "grade", grade)
    assert source.evaluate(source.model)["pass@1"] == pytest.approx(3 / 12)
