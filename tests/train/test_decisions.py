"""When the trainer validates and saves: its decisions after a step, without training."""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import numpy as np
import pytest
import torch

from nanochat_ray.train import build_model
from nanochat_ray.train import trainer as trainer_module
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.step import Batch, RankVotes, StepResult
from nanochat_ray.train.trainer import Evaluation, Trainer
from tests.train.run_trainer import FunctionHooks

BATCH = Batch(np.zeros((1, 3), dtype=np.uint16))
CONFIG = TrainConfig(steps=20, global_batch_size=1, micro_batch_size=1, eval_every=4, save_every=6)


def test_deterministic_algorithms_are_those_of_cublas_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    environment: dict[str, str] = {}
    monkeypatch.setattr(build_model.os, "environ", environment)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", calls.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    build_model.use_deterministic_algorithms()
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    assert calls == [True]
    assert not torch.backends.cudnn.benchmark


class Decider(Trainer):
    """A trainer that writes down what it would do."""

    def __init__(self, step: int, *, is_best: bool, skipped_steps: int, **changes: Any):
        self.train_config = dataclasses.replace(CONFIG, **changes)
        self.completed_steps, self.save_pending, self.hooks = step, False, []
        self.calls: list[Any] = []
        self.is_best = is_best
        self.guard = types.SimpleNamespace(  # type: ignore[assignment]
            skipped_steps=skipped_steps,
            check_weights=lambda *args: self.calls.append(("check", *args[:3])),
        )
        self.checkpointer = types.SimpleNamespace(  # type: ignore[assignment]
            writer=types.SimpleNamespace(release=lambda: self.calls.append("release"))
        )

    def evaluate(self) -> Evaluation:
        self.calls.append("evaluate")
        return Evaluation(0.5, self.is_best)

    def save(self, metric: float | None = None) -> None:
        self.calls.append(("save", metric))
        self.save_pending = False


def decide(
    step: int,
    *,
    loss: float = 2.0,
    votes: RankVotes = RankVotes(writer_idle=True),  # noqa: B008 (immutable)
    pending: bool = False,
    is_best: bool = False,
    skipped_steps: int = 0,
    **changes: Any,
) -> tuple[str, Decider]:
    """Letters of what is done: e(valuation), s(aving), c(hecked first); m: with its metric.

    Where nothing is saved, the writer is released.
    """
    decider = Decider(step, is_best=is_best, skipped_steps=skipped_steps, **changes)
    decider.save_pending = pending
    result = StepResult(loss, 1.0, 5, 1.0, True, votes, 8)
    decider._evaluate_and_save(result, BATCH)
    letters = ""
    is_saved = any(call[0] == "save" for call in decider.calls)
    assert decider.calls.count("release") == (not is_saved)
    for call in decider.calls:
        if call == "release":
            continue
        if call == "evaluate":
            letters += "e"
        elif call[0] == "check":
            assert call[1:3] == (step, loss)
            assert call[3] == (0.5 if "e" in letters else None)
            letters += "c"
        else:
            letters += "sm" if call[1] == 0.5 else "s"
    return letters, decider


IDLE, BUSY = RankVotes(writer_idle=True), RankVotes()
STOP = RankVotes(stop=True)


@pytest.mark.parametrize(
    ("step", "fields", "letters"),
    [
        (5, {}, ""),
        (4, {}, "e"),
        (6, {}, "cs"),
        (12, {}, "ecsm"),  # both
        (12, {"eval_every": 0, "save_every": 0}, ""),
        (20, {"eval_every": 0, "save_every": 0}, "ecsm"),  # the last step does both
        (20, {"votes": BUSY, "skipped_steps": 1}, "ecsm"),
        (4, {"is_best": True}, "ecsm"),
        (4, {"is_best": True, "votes": BUSY}, "ecsm"),  # is not missed
        (4, {"is_best": True, "keep_best": False}, "e"),
        (6, {"votes": BUSY}, ""),  # waits for the writer,
        (7, {"pending": True, "votes": BUSY}, ""),
        (7, {"pending": True}, "cs"),  # which is idle now
        (6, {"skipped_steps": 1}, ""),
        (4, {"is_best": True, "skipped_steps": 1}, "e"),
        (5, {"votes": STOP}, "s"),  # a hook stops the run
        (5, {"votes": STOP, "skipped_steps": 1}, ""),
        (5, {"votes": STOP, "loss": math.nan}, ""),
        (6, {"votes": RankVotes(stop=True, writer_idle=True)}, "cs"),
    ],
)
def test_what_follows_a_step(step: int, fields: dict[str, Any], letters: str) -> None:
    assert decide(step, **fields)[0] == letters


def test_a_due_checkpoint_stays_due() -> None:
    assert decide(6, votes=BUSY)[1].save_pending
    assert decide(6, skipped_steps=1)[1].save_pending
    assert not decide(6)[1].save_pending


def test_hooks_are_polled_all() -> None:
    """One of them wants a checkpoint; each is asked, since asking is collective."""
    for answers in ([True, False], [False, True], [False, False]):
        numbers: list[int] = []
        decider = Decider(5, is_best=False, skipped_steps=0)
        decider._last_poll = -math.inf

        def ask(number: int, answer: bool, numbers: list[int] = numbers) -> bool:
            numbers.append(number)
            return answer

        decider.hooks = [
            FunctionHooks(should_save=lambda n=n, a=a: ask(n, a))  # type: ignore[misc]
            for n, a in enumerate(answers)
        ]
        for votes in (IDLE, RankVotes(writer_idle=True, poll=True)):
            decider._evaluate_and_save(StepResult(2.0, 1.0, 5, 1.0, True, votes, 8), BATCH)
            assert numbers == [0, 1] * votes.poll
        assert (("save", None) in decider.calls) == any(answers)
        assert decider._last_poll > 0


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("writer_idle", [True, False])
def test_votes_of_a_rank(rank: int, writer_idle: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer is held before steps that a checkpoint may follow, and rank 0 alone has one."""
    now = 100.0
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: now)
    for step, pending, since, may_save in (
        (4, False, 5.0, False),
        (4, False, 5.5, True),  # hooks are polled
        (4, True, 0.0, True),
        (5, False, 0.0, True),  # step 6 saves,
        (7, False, 0.0, True),  # and step 8 validates
    ):
        for has_error, stops in ((False, (False, True)), (True, (False, False))):
            holds: list[int] = []
            decider = Decider(step, is_best=False, skipped_steps=0)
            decider.ranks = types.SimpleNamespace(rank=rank)  # type: ignore[assignment]
            decider.save_pending, decider._last_poll = pending, now - since
            writer = types.SimpleNamespace(
                hold=lambda h=holds: h.append(1) or writer_idle, has_error=has_error
            )
            decider.checkpointer = types.SimpleNamespace(writer=writer)  # type: ignore[assignment]
            decider.hooks = [FunctionHooks(should_stop=lambda stop=stop: stop) for stop in stops]
            assert decider._votes() == RankVotes(
                stop=any(stops),
                poll=since > 5 and rank == 0,
                writer_idle=rank == 0 and may_save and writer_idle,
                writer_error=has_error,
            )
            assert len(holds) == (rank == 0 and may_save)
