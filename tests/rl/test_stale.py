"""Rollouts of the next step run while a step trains: fixed versions, and so fixed bits."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
from torch import Tensor

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.offline import LocalEngine
from nanochat_ray.engine.request import Request, RequestOutput
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.source import RolloutSource
from nanochat_ray.storage import Store
from tests.rl.tiny_rl import RL, run_rl, save_parent, weights_digest

STALE = dataclasses.replace(RL, stale=1)


class LoggingEngine(LocalEngine):
    """Records (version, thread) of each call."""

    calls: list[tuple[int, str]]

    def run(self, requests: Iterable[Request]) -> Iterator[RequestOutput]:
        self.calls.append((self.version, threading.current_thread().name))
        return super().run(requests)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[dict[str, Any]]]:
    root = Store.at(str(tmp_path_factory.mktemp("stale")))
    save_parent(root)
    return root, run_rl(root, "whole", rl=STALE, steps=5)


def test_answers_are_one_step_old(whole: tuple[Store, Any]) -> None:
    rl = dataclasses.replace(STALE, max_rounds=1)
    LoggingEngine.calls = []

    def make_source(*args: Any) -> RolloutSource:
        return RolloutSource(*args, make_engine=LoggingEngine.from_model)

    run_rl(whole[0], "versions", rl=rl, steps=4, make_source=make_source)
    calls = LoggingEngine.calls
    # Validation, step 0, then steps 1 to 3 ahead, and the last validation.
    assert [version for version, _ in calls] == [0, 0, 0, 1, 2, 4]
    ahead = ["rollouts" in name for _, name in calls]
    assert ahead == [False, False, True, True, True, False]


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_stopped_stale_run_ends_equal(whole: tuple[Store, Any], stop_after: int) -> None:
    root, run = whole[0], f"stopped-{stop_after}"
    run_rl(root, run, rl=STALE, steps=5, stop_after=stop_after)
    run_rl(root, run, rl=STALE, steps=5)
    assert weights_digest(root, run) == weights_digest(root, "whole")


def test_stale_is_not_on_policy(whole: tuple[Store, list[dict[str, Any]]]) -> None:
    root, records = whole
    run_rl(root, "on-policy", steps=5)
    assert weights_digest(root, "on-policy") != weights_digest(root, "whole")
    first, *later = [r["logprob_diff"] for r in records if r["kind"] == "train"]
    assert first < 2e-5  # the only step whose answers are of its own weights
    assert min(later) > 1e-4


def test_checkpoint_holds_the_answers_ahead(whole: tuple[Store, Any]) -> None:
    root = whole[0]
    run_rl(root, "holds", rl=STALE, steps=5, stop_after=2)
    groups, seconds = checkpoint.load_trainer(root.child("runs", "holds"))["source"]["ahead"]
    assert len(groups) >= STALE.questions
    assert seconds > 0
    *_, rollouts, rewards = groups[0]
    assert len(rollouts) == len(rewards) == STALE.samples
    assert {version for *_, version in rollouts} == {1}
    # Behind the last step there is none.
    assert checkpoint.load_trainer(root.child("runs", "whole"))["source"]["ahead"] is None


class UnreadyEngine(LocalEngine):
    """Rollouts of another version than the step's."""

    def load(self, version: int, weights: Mapping[str, Tensor]) -> None:
        super().load(-7, weights)


def test_answers_of_another_version_are_an_error(whole: tuple[Store, Any]) -> None:
    def make_source(*args: Any) -> RolloutSource:
        return RolloutSource(*args, make_engine=UnreadyEngine.from_model)

    with pytest.raises(AssertionError):
        run_rl(whole[0], "unready", rl=STALE, make_source=make_source)


def test_stale_is_0_or_1() -> None:
    with pytest.raises(ValueError, match="stale=2 is not allowed: 0 or 1"):
        RLConfig(stale=2)
