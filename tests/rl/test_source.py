"""RL runs of a tiny policy: what changes no bit, what is learned, what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.offline import LocalEngine
from nanochat_ray.engine.request import Finish, Request
from nanochat_ray.model.gpt import GPT
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.questions import questions_needed
from nanochat_ray.rl.source import RolloutSource
from nanochat_ray.storage import Store
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.step import Batch
from tests.rl.tiny_rl import (
    ENGINE,
    RL,
    TASK,
    TRAIN,
    FakeEngine,
    job,
    run_rl,
    save_parent,
    weights_digest,
)
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[dict[str, Any]]]:
    """A storage root with an uninterrupted run "whole", and its records."""
    root = Store.at(str(tmp_path_factory.mktemp("rl")))
    save_parent(root)
    return root, run_rl(root, "whole")


def test_stopped_and_resumed_ends_equal(whole: tuple[Store, Any]) -> None:
    root, _ = whole
    records = run_rl(root, "stopped", stop_after=3)
    assert sum(r["kind"] == "train" for r in records) == 3
    run_rl(root, "stopped")
    assert weights_digest(root, "stopped") == weights_digest(root, "whole")


def test_slots_of_the_engine_change_no_bit(whole: tuple[Store, Any]) -> None:
    root, _ = whole
    few = dataclasses.replace(ENGINE, max_num_seqs=3, max_num_batched_tokens=7, prefill_chunk=5)
    run_rl(root, "few", engine=few)
    assert weights_digest(root, "few") == weights_digest(root, "whole")


def test_engine_and_trainer_agree(whole: tuple[Store, list[dict[str, Any]]]) -> None:
    steps = [r for r in whole[1] if r["kind"] == "train"]
    assert 0 < max(r["logprob_diff"] for r in steps) < 2e-5


def test_the_longest_question_bounds_max_tokens(whole: tuple[Store, Any]) -> None:
    root, _ = whole
    model, _ = checkpoint.load_model(root.child("runs", "chat"))

    def setup(max_tokens: int) -> RolloutSource:
        rl = dataclasses.replace(RL, max_tokens=max_tokens)
        source = RolloutSource(job(root, "bound", rl=rl), rl, ENGINE)
        source.setup(model, Ranks())
        return source

    source = setup(1)
    assert all(block.attn.in_float64 for block in model.blocks)
    room = 48 - max(source.questions.longest, source.val_questions.longest)
    assert setup(room).sampler.params.max_tokens == room
    with pytest.raises(ValueError, match=rf"max_tokens={room + 1} .* leaves {room} of"):
        setup(room + 1)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_they_agree_at_other_temperatures(whole: tuple[Store, Any], temperature: float) -> None:
    rl = dataclasses.replace(RL, temperature=temperature)
    records = run_rl(whole[0], f"at-{temperature}", rl=rl, steps=1)
    (diff,) = (r["logprob_diff"] for r in records if r["kind"] == "train")
    assert 0 < diff < 2e-5


class StaleEngine(LocalEngine):
    """Keeps the weights of step 0 under any version."""

    def load(self, version: int, weights: Any) -> None:
        if self.version < 0:
            super().load(version, weights)
        self.engine.weight_version = str(version)


def test_stale_weights_are_an_error(whole: tuple[Store, Any]) -> None:
    def make_source(*args: Any) -> RolloutSource:
        return RolloutSource(*args, make_engine=StaleEngine.from_model)

    with pytest.raises(FloatingPointError, match=r"logprob_diff=.*max_logprob_diff=0\.0001"):
        run_rl(whole[0], "stale", make_source=make_source)


@pytest.mark.slow
def test_reward_rises(root: Store) -> None:
    save_parent(root)
    # The policy does not know "talk". Of 192 answers and of 288: means whose standard deviation
    # is 0.03, where nine other seeds gained 0.33 and more.
    rl = dataclasses.replace(RL, rehearsal=0, eval_questions=12, eval_samples=24)
    records = run_rl(root, "learns", steps=30, rl=rl)
    rewards = [r["reward"] for r in records if r["kind"] == "train"]
    assert np.mean(rewards[-8:]) > np.mean(rewards[:8]) + 0.2
    evals = [r["pass@1"] for r in records if r["kind"] == "eval"]
    assert evals[-1] > evals[0] + 0.2
    samples = [r for r in records if r["kind"] == "sample"]
    assert {r["reward"] for r in samples} <= {0.0, 1.0}


@pytest.mark.parametrize(
    "change", [{"samples": 5}, {"loss": "grpo"}, {"tasks": (f"{TASK},extra=x",)}]
)
def test_another_configuration_is_refused(whole: tuple[Store, Any], change: Any) -> None:
    (field,) = change
    with pytest.raises(ValueError, match=f"{field}=.* is not what this run was started with"):
        job(whole[0], "whole", rl=dataclasses.replace(RL, **change))


def test_what_was_given_is_named_first(whole: tuple[Store, Any]) -> None:
    """Not the batch size, which follows from it."""
    train = dataclasses.replace(TRAIN, global_batch_size=80)
    with pytest.raises(ValueError, match=r"samples=5 is not what this run was started with \(6\)"):
        job(whole[0], "whole", train, dataclasses.replace(RL, samples=5))


def test_gives_up_after_ten_steps_without_reward(
    whole: tuple[Store, Any], monkeypatch: Any
) -> None:
    monkeypatch.setattr("tests.rl.tiny_rl.EvenFirst.grade", lambda *_: False)
    rl = dataclasses.replace(RL, questions=1, samples=2, max_rounds=1)
    run_rl(whole[0], "hopeless", rl=rl, steps=20, save_every=1, stop_after=4)
    with pytest.raises(ValueError, match=r"no answer of the last 10 steps is right.* from; fi"):
        run_rl(whole[0], "hopeless", rl=rl, steps=20, save_every=1)
    trainer = checkpoint.load_trainer(whole[0].child("runs", "hopeless"))
    assert 4 <= trainer["step"] < 10
    assert trainer["source"]["steps_without_reward"] == trainer["step"]  # also over the stop


def test_answers_that_are_cut_are_named(whole: tuple[Store, Any], monkeypatch: Any) -> None:
    """They have no reward, whatever the task says."""
    monkeypatch.setattr("nanochat_ray.rl.source.MAX_STEPS_WITHOUT_REWARD", 1)
    rl = dataclasses.replace(RL, max_rounds=1, max_tokens=1, truncation="wrong")
    with pytest.raises(ValueError, match="to learn from: max_tokens=1 cuts 100% of them; fine-tun"):
        run_rl(whole[0], "cut", rl=rl)


def test_solved_tasks_keep_the_weights(whole: tuple[Store, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr("tests.rl.tiny_rl.EvenFirst.grade", lambda *_: True)
    records = run_rl(whole[0], "solved", steps=1)
    (step,) = (r for r in records if r["kind"] == "train")
    assert (step["skipped"], step["reward"], step["groups_with_signal"]) == (True, 1.0, 0)


@pytest.mark.parametrize(
    ("num_groups", "num_with_signal", "count"),
    [
        (0, 0, 24),  # the first round
        (24, 8, 0),  # enough
        (24, 7, 4),  # one is missing, and 7 of 24 had signal: 24 / 7
        (24, 1, 24),  # 7 · 24 are too many
        (24, 0, 24),
        (48, 6, 16),
    ],
)
def test_rounds_are_as_large_as_needed(num_groups: int, num_with_signal: int, count: int) -> None:
    config = RLConfig(questions=24, min_groups=8)
    assert questions_needed(config, num_groups, num_with_signal) == count


# --- a batch of known answers ---------------------------------------------------------------------

RIGHT, WRONG = [66, 7], [67, 68, 69]  # "B" and a stop token; "CDE"


def fixed_answer(_: int, request: Request) -> tuple[list[int], list[float | None], Finish]:
    """Two of three samples give ``RIGHT``, the third ``WRONG``, which is truncated."""
    if request.id.endswith("/2"):
        return WRONG, [-1.0, None, -3.0], "length"
    return RIGHT, [-0.5, -0.25], "stop"


def first_batch(root: Store, **changes: Any) -> Batch:
    rl = dataclasses.replace(RL, questions=1, samples=3, min_groups=1, rehearsal=0, **changes)
    config = job(root, "fixed", rl=rl)
    source = RolloutSource(config, rl, ENGINE, lambda *_: FakeEngine(fixed_answer))
    source.setup(GPT(tiny_config(sequence_len=48)), Ranks())
    return next(source.batches(0))


def test_equal_answers_are_one_sequence(whole: tuple[Store, Any]) -> None:
    batch = first_batch(whole[0])
    assert batch.ids.shape[0] == 2
    assert batch.mask is not None
    start = int(np.argmax(batch.mask[0]))
    assert batch.ids[0, start : start + 2].tolist() == RIGHT
    assert batch.mask[0].sum() == 2
    # The token that a tool injected is not trained on.
    assert batch.mask[1, start : start + 3].tolist() == [1, 0, 1]
    assert batch.token_inputs["weights"][0, start] == 2.0  # two samples
    assert batch.token_inputs["advantages"][0, start] == pytest.approx(1 / 3)
    assert batch.token_inputs["advantages"][1, start] == pytest.approx(-2 / 3)
    assert batch.token_inputs["logprobs"][1, start : start + 3].tolist() == [-1.0, 0.0, -3.0]
    assert batch.denominator == 2 + 2 + 2  # sampled tokens of all three answers
    figures = batch.metrics
    assert figures["truncated_share"] == pytest.approx(1 / 3)
    assert figures["entropy"] == pytest.approx((0.75 + 0.75 + 4.0) / 6)
    assert figures["reward"] == pytest.approx(2 / 3)


def test_masked_truncated_answers_are_left_out(whole: tuple[Store, Any]) -> None:
    batch = first_batch(whole[0], truncation="mask")
    assert batch.ids.shape[0] == 1
    assert batch.denominator == 4
