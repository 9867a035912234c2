"""Rollouts on actors: any number of engines, and engines that die, change no token and no bit."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import ray

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.cli import eval as eval_command
from nanochat_ray.engine.offline import LocalEngine
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.on_ray.fleet import ActorEngine, Fleet
from nanochat_ray.on_ray.fleet_engine import FleetEngine
from nanochat_ray.on_ray.rl import engine_spec, fit_rl
from nanochat_ray.rl.rollout import Rollout, sample_rollouts
from nanochat_ray.storage import Store
from tests.rl.tiny_rl import ENGINE, RL, TASK, job, run_rl, save_parent, weights_digest
from tests.tiny import TOKENIZER
from tests.waiting import wait_for

pytestmark = pytest.mark.ray


class GatedEngine(FleetEngine):
    """Waits in each call for the file ``gate``, so that a test can end it inside one."""

    def set_folder(self, folder: Path) -> None:
        self.folder = folder

    def run(self, *args: Any) -> list[Any]:
        if (folder := getattr(self, "folder", None)) is not None:  # it has not been restarted
            (folder / f"call-{os.getpid()}").touch()
            wait_for((folder / "gate").exists, 180, "the gate")
        return super().run(*args)


def requests(count: int) -> list[Request]:
    params = [SamplingParams(seed=i, max_tokens=12, logprobs=0) for i in range(count)]
    return [Request(id=str(i), prompt=[1, i, 2], params=p) for i, p in enumerate(params)]


def test_requests_of_a_dead_engine_run_elsewhere(
    root: Store, tmp_path: Path, ray_session: None
) -> None:
    save_parent(root)
    config = job(root, "fleet")
    model, _ = checkpoint.load_model(root.child("runs", "chat"))
    local = LocalEngine.from_model(model, TOKENIZER, ENGINE)
    local.load(7, model.state_dict())
    reference = sample_rollouts(local, requests(30))
    actor = ray.remote(num_cpus=0, max_restarts=-1)(GatedEngine)
    engines = [actor.remote(False, 1) for _ in range(2)]
    ray.get([engine.set_folder.remote(tmp_path) for engine in engines])
    fleet = Fleet([ActorEngine(engine) for engine in engines], engine_spec(config, ENGINE))
    fleet.load(7, model.state_dict())
    answers: list[list[Rollout]] = []
    thread = threading.Thread(target=lambda: answers.append(sample_rollouts(fleet, requests(30))))
    thread.start()
    wait_for(lambda: len(list(tmp_path.glob("call-*"))) == 2, 120, "a call of each engine")
    ray.kill(engines[0], no_restart=False)
    (tmp_path / "gate").touch()
    wait_for(lambda: not thread.is_alive(), 120, "the rollouts")
    assert fleet.num_lost_engines == 1
    assert answers == [reference]
    # The engine that was restarted takes the weights of the version that a call names.
    ray.get(engines[0].ping.options(max_task_retries=-1).remote(), timeout=120)
    assert sample_rollouts(fleet, requests(30)) == reference
    for engine in engines:
        ray.kill(engine)


@pytest.mark.parametrize("stale", [0, 1])
def test_two_engines_and_two_ranks_change_no_bit(
    root: Store, ray_session: None, stale: int
) -> None:
    save_parent(root)
    rl = dataclasses.replace(RL, stale=stale)
    run_rl(root, "here", rl=rl)
    result = fit_rl(job(root, "there", rl=rl), rl, ENGINE, engines=2, workers=2)
    assert result["done"]
    assert weights_digest(root, "there") == weights_digest(root, "here")


def test_eval_on_two_engines_equals_one(
    root: Store, ray_session: None, capsys: pytest.CaptureFixture[str]
) -> None:
    save_parent(root)
    run = root.child("runs", "chat")
    options: dict[str, Any] = {"storage": root.uri, "tasks": (TASK,), "threads": 1, "show_wrong": 0}
    options |= {"count": 40, "samples": 2, "max_tokens": 8}
    outcomes = []
    for engines in (0, 2):
        eval_command.main(eval_command.Args(engines=engines, **options))
        # Figures and answers; these in the order in which they were complete.
        files = [json.loads(run.read_text(f"evals/{name}")) for name in run.list("evals")]
        outcomes.append((capsys.readouterr().out.splitlines()[-1], files))
        run.delete("evals")  # figures of equal settings would not be measured again
    assert outcomes[0] == outcomes[1]
    _, (_, answers) = outcomes[0]
    assert len(answers["answers"]) == 80
    assert len(set(answers["answers"].values())) > 5
