"""``nanochat-ray rl`` as a person runs it."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat_ray import container
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.cli import rl, supervise, train_run
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.on_ray import fleet, session
from nanochat_ray.on_ray import rl as rl_on_ray
from nanochat_ray.rl import source as sources
from nanochat_ray.storage import Store
from nanochat_ray.train.config import MAX_INT
from nanochat_ray.train.stop import STOPPED
from tests.rl.tiny_rl import TASK, save_parent
from tests.tiny import save_model


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
    assert lines[0] == "rehearsing the conversations of dataset talk"
    (first,) = (line for line in lines if line.startswith("step 1/2"))
    for figure in ("reward", "signal", "|Δlogp|", "rollout tokens/s", "entropy", "truncated"):
        assert figure in first
    result = json.loads(lines[-1])
    assert "pass@1 on new questions, before → after" in lines
    assert (result["run"], result["step"], result["done"]) == ("rl", 2, True)
    report = root.child("runs", "rl").read_text("report.html")
    for title in (
        "reward (mean over",
        "validation, pass@1",
        "rehearsed",
        "Sampled texts after step 2",
    ):
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
        ({"train": {"seed": -1}}, "seed=-1 is not allowed: a whole number from 0"),
        ({"train": {"keep_latest_k": 0}}, "keep_latest_k=0 is not allowed"),
        ({"engine": {"max_num_seqs": 0}}, "max_num_seqs=0 is not allowed"),
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


def test_a_base_model_is_no_parent(root: Store) -> None:
    save_parent(root)
    run = root.child("runs", "chat")
    model, tokenizer = checkpoint.load_model(run)
    save_model(run, 2, model, tokenizer=tokenizer, train_config={"stage": "base"})
    with pytest.raises(ValueError, match="parent='chat' is not allowed: a chat model; this is a"):
        rl.build(rl.Args(storage=root.uri, tasks=(TASK,)))


def test_killed_run_continues(
    root: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_parent(root)
    monkeypatch.setattr(supervise, "supervise", lambda restarts, progress: (restarts, progress()))
    args = rl.Args(storage=root.uri, tasks=(TASK,), resume="never", restarts=2)
    save_model(root.child("runs", "rl"), 3, checkpoint.load_model(root.child("runs", "chat"))[0])
    assert rl.main(args) == (2, "step-000003")
    monkeypatch.setenv(supervise.MARK, f"{os.getppid()}:0")
    with pytest.raises(ValueError, match="resume='never', but run 'rl' exists"):
        rl.main(args)
    monkeypatch.setenv(supervise.MARK, f"{os.getppid()}:1")
    with pytest.raises(ValueError, match="run 'rl'"):  # it is another run's
        rl.main(args)


@pytest.mark.parametrize("flags", [{"endpoint": "app"}, {"engines": 2}, {"workers": 2}])
def test_flags_that_need_ray(flags: dict[str, Any]) -> None:
    (name,) = flags
    with pytest.raises(ValueError, match=f"{name}=.* is not allowed: only on Ray"):
        rl.main(rl.Args(**flags, ray=False))


def test_a_gpu_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="gpus=True is not allowed: this machine has no CUDA"):
        rl.check_here(rl.Args(gpus=True))
    with pytest.raises(ValueError, match="stale=1 is not allowed: only on Ray"):
        rl.check_here(rl.Args(gpus=True, stale=1))


LEAST = {"steps": 1, "engines": 0, "workers": 1, "threads": 0, "restarts": 0, "print_every": 1}


@pytest.mark.parametrize("name", LEAST)
def test_numbers_to_their_bounds(name: str) -> None:
    for value in (LEAST[name], MAX_INT):
        assert getattr(rl.Args(**{name: value}), name) == value  # type: ignore[arg-type]
    for value in (LEAST[name] - 1, MAX_INT + 1):
        with pytest.raises(ValueError, match=f"{name}={value} is not allowed"):
            rl.Args(**{name: value})  # type: ignore[arg-type]
    for scale in (0.0, -1.0):
        with pytest.raises(ValueError, match="lr_scale="):
            rl.Args(lr_scale=scale)


def test_batches_are_larger_than_for_serving() -> None:
    """Sequences at most as many as a round has answers; fewer beside the users of an endpoint."""
    flags: dict[str, Any] = {"rl": {"questions": 8, "samples": 16}}
    sizes = ("max_num_seqs", "max_num_batched_tokens", "prefill_chunk", "max_queue_size")
    reference = [
        *((64, 512, 512, 1024), (16, 48, 512, 1024), (32, 96, 512, 1024)),
        (6, 512, 512, 1024),
    ]
    for index, args in enumerate(
        (
            rl.Args(**flags),
            rl.Args(**flags, endpoint="app"),
            rl.Args(**flags, endpoint="app", gpus=True),
            rl.Args(rl={"questions": 2, "samples": 3}),
        )
    ):
        config = rl.engine_config(args)
        assert tuple(getattr(config, name) for name in sizes) == reference[index]
        assert (config.max_queue_s, config.precision) == (0.0, "fp32")
    config = rl.engine_config(rl.Args(**flags, precision="bf16", engine={"max_num_seqs": 5}))
    assert (config.max_num_seqs, config.precision) == (5, "bf16")


def test_flags_of_the_job(root: Store) -> None:
    save_parent(root)
    flags: dict[str, Any] = {"storage": root.uri, "tasks": (TASK,)}
    flags["rl"] = {"questions": 3, "samples": 4, "max_tokens": 4, "max_rounds": 2}
    plain = rl.build(rl.Args(**flags))
    assert (plain.run, plain.parent, plain.dataset, plain.train.steps) == ("rl", "chat", "", 60)
    assert (plain.train.stage, plain.train.precision) == ("rl", "fp32")
    assert plain.train.global_batch_size == 3 * 4 * 2
    job = rl.build(
        rl.Args(
            **flags,
            run="mine",
            steps=5,
            lr_scale=3.0,
            optim={"momentum": 0.5},
            train={"seed": 7, "micro_batch_size": 2},
            wandb="p",
            tensorboard="t",
        )
    )
    assert (job.run, job.train.steps, job.wandb, job.tensorboard) == ("mine", 5, "p", "t")
    assert (job.train.seed, job.train.micro_batch_size, job.train.optim.momentum) == (7, 2, 0.5)
    assert job.train.optim.matrix_lr == pytest.approx(3 * plain.train.optim.matrix_lr)


def test_learning_rates_follow_a_fine_tuned_parent(root: Store) -> None:
    save_parent(root)
    run = root.child("runs", "chat")
    model, tokenizer = checkpoint.load_model(run)
    rates = []
    for step, stage in ((2, "sft"), (3, "rl")):
        before = {"stage": stage, "optim": {"matrix_lr": 0.5}}
        save_model(run, step, model, tokenizer=tokenizer, train_config=before)
        job = rl.build(rl.Args(storage=root.uri, tasks=(TASK,), rl={"max_tokens": 4}))
        rates.append(job.train.optim.matrix_lr)
    assert rates[0] == pytest.approx(0.05)  # a tenth
    assert rates[1] != rates[0]


@pytest.mark.parametrize(
    ("flags", "cores", "reference"),
    [
        ({}, 8, {"engines": 4, "gpus": False, "checked_gpus": 0, "threads": 1}),
        ({}, 2, {"engines": 2, "gpus": False, "checked_gpus": 0, "threads": 1}),
        ({"gpus": True}, 2, {"engines": 1, "gpus": True, "checked_gpus": 2, "threads": 1}),
        ({"engines": 3}, 13, {"engines": 3, "gpus": False, "checked_gpus": 0, "threads": 4}),
        ({"engines": 1, "workers": 3}, 13, {"engines": 1, "checked_gpus": 0, "threads": 4}),
        ({"threads": 7}, 8, {"engines": 4, "checked_gpus": 0, "threads": 7}),
        (
            {"endpoint": "app", "gpus": True, "workers": 2},
            9,
            {"engines": 5, "checked_gpus": 2, "endpoint": "app", "threads": 1},
        ),
    ],
)
def test_engines_and_threads_fit_the_machine(
    monkeypatch: pytest.MonkeyPatch,
    flags: dict[str, Any],
    cores: int,
    reference: dict[str, Any],
) -> None:
    calls: dict[str, Any] = {}
    monkeypatch.setattr(container, "cores", lambda: cores)
    monkeypatch.setattr(session, "connect", lambda: None)
    monkeypatch.setattr(session, "check_gpus", lambda n: calls.update(checked_gpus=n))
    monkeypatch.setattr(fleet, "num_replicas", lambda application: 5)

    def fit(config: Any, rl_config: Any, engine: EngineConfig, **options: Any) -> dict[str, Any]:
        calls.update(options)
        return {"done": True}

    monkeypatch.setattr(rl_on_ray, "fit_rl", fit)
    config: Any = None
    args = rl.Args(**flags, print_every=9)
    assert rl.run_on_ray(config, args) == {"done": True}
    assert reference.items() <= calls.items()
    assert (calls["workers"], calls["print_every"]) == (args.workers, 9)


@pytest.mark.parametrize("ray", [True, False])
def test_a_run_ends_with_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ray: bool
) -> None:
    for name in ("RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    result = {"done": not ray, "first_pass@1": 0.25, "pass@1": 0.5}
    monkeypatch.setattr(rl, "build", lambda args: SimpleNamespace(run="mine"))
    other = "run_here" if ray else "run_on_ray"
    monkeypatch.setattr(rl, other, None)
    monkeypatch.setattr(rl, "run_on_ray" if ray else "run_here", lambda *_: result)
    assert rl.main(rl.Args(ray=ray)) == (STOPPED if ray else 0)
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["mean", "of", "the", "tasks", "25.0%", "→", "50.0%"]
    assert json.loads(last) == {"run": "mine", **result}
    monkeypatch.setenv("RANK", "1")
    rl.main(rl.Args(ray=ray))
    assert capsys.readouterr().out == ""


def test_here_the_engine_shares_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(container, "cores", lambda: 7)
    monkeypatch.setattr(sources, "RolloutSource", lambda *_: "source")
    monkeypatch.setattr(train_run, "train_here", lambda config, **options: calls.append(options))
    config: Any = None
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    rl.run_here(config, rl.Args())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    rl.run_here(config, rl.Args(gpus=True, print_every=5))
    rl.run_here(config, rl.Args(threads=9, stale=1))
    assert threads == [6, 3, 9]  # one of 7 cores is left to all else
    assert calls[:2] == [
        {"source": "source", "gpus": False, "print_every": 1},
        {"source": "source", "gpus": True, "print_every": 5},
    ]
