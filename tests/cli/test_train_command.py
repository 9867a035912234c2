"""``nanochat-ray train``: from its flags to a job, and where the job runs. No training."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nanochat_ray import container
from nanochat_ray.cli import supervise, train, train_job, train_run
from nanochat_ray.cli.train import Args
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.train import recipe, throughput
from nanochat_ray.train.config import TrainerConfig
from nanochat_ray.train.stop import STOPPED
from nanochat_ray.train.throughput import Throughput
from tests.tiny import TOKENIZER, save_model, tiny_config, write_dataset


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dataset(root: Store) -> Store:
    """Storage with a base dataset of 50 sequences of 32 tokens."""
    write_dataset(root, "base")
    return root


def build(root: Store, **flags: Any) -> TrainerConfig:
    settings = {"storage": root.uri, "depth": 1, "tokens": 640, "precision": "fp32", "workers": 1}
    return train_job.build(Args(**{**settings, **flags}))  # type: ignore[arg-type]


def save_run(root: Store, name: str, **about: Any) -> None:
    model = GPT(tiny_config())
    save_model(root.child("runs", name), 3, model, metrics={}, **about)


def test_the_batch_is_in_tokens_or_in_sequences(dataset: Store) -> None:
    assert build(dataset, batch_tokens=128).train.global_batch_size == 128 // 32
    train = {"global_batch_size": 8, "micro_batch_size": 2}
    both = build(dataset, batch_tokens=128, train=train).train
    assert (both.global_batch_size, both.micro_batch_size, both.steps) == (8, 2, 640 // (8 * 32))


def test_flags_replace_what_is_derived(dataset: Store) -> None:
    plain, other = build(dataset), build(dataset, lr_scale=2.0, optim={"momentum": 0.5})
    assert other.train.optim.matrix_lr == 2 * plain.train.optim.matrix_lr
    assert other.train.optim.momentum == 0.5 != plain.train.optim.momentum
    job = build(dataset, model={"softcap": 9.0}, train={"seed": 7, "save_every": 3})
    assert (job.model.softcap, job.train.seed, job.train.save_every) == (9.0, 7, 3)
    assert (plain.model.n_layer, plain.model.vocab_size) == (1, TOKENIZER.vocab_size)
    assert (plain.model.sequence_len, plain.dataset, plain.run) == (32, "base", "base")
    assert (plain.parent, plain.about, plain.train.precision) == ("", {}, "fp32")
    write_dataset(dataset, "more")
    job = build(dataset, dataset="more", run="mine", tensorboard="board", wandb="project")
    assert (job.dataset, job.run, job.tensorboard, job.wandb) == (
        "more",
        "mine",
        "board",
        "project",
    )


def test_the_length_follows_the_parameters(dataset: Store) -> None:
    job = build(dataset, tokens=None, tokens_per_param=2.0, batch_tokens=128)
    tokens = recipe.training_tokens(job.model, 2.0)
    assert job.train.steps == round(tokens / 128)
    default = build(dataset, tokens=None, batch_tokens=128)
    assert default.train.steps == round(tokens * 12 / 2 / 128)


def test_a_batch_longer_than_the_run_is_refused(dataset: Store) -> None:
    assert build(dataset, batch_tokens=640).train.steps == 1
    message = "batch_tokens=672 is not allowed: up to the 640 tokens of the whole run"
    with pytest.raises(ValueError, match=message):
        build(dataset, batch_tokens=672)
    with pytest.raises(ValueError, match="batch_tokens=672 is not allowed"):
        build(dataset, train={"global_batch_size": 21})


def test_a_parent_brings_its_model(dataset: Store) -> None:
    save_run(dataset, "base")
    flags = {"depth": None, "parent": "base", "run": "more"}
    job = build(dataset, model={"dropout": 0.1, "n_embd": 32}, **flags)
    assert (job.parent, job.model.n_layer, job.model.dropout) == ("base", 2, 0.1)
    message = r"--model.n-embd=64 is not allowed: a parent's model has n_embd=32"
    with pytest.raises(ValueError, match=message):
        build(dataset, model={"n_embd": 64}, **flags)


def test_fine_tuning_passes_over_its_dataset(dataset: Store) -> None:
    write_dataset(dataset, "sft", "sft")
    save_run(dataset, "base", train_config={"precision": "bf16"})
    flags = {"stage": "sft", "depth": None, "tokens": None, "batch_tokens": 160}
    job = build(dataset, **flags)
    assert (job.dataset, job.run, job.parent, job.model.n_layer) == ("sft", "chat", "base", 2)
    assert (job.train.stage, job.train.global_batch_size, job.train.steps) == ("sft", 5, 10)
    assert build(dataset, epochs=2.5, **flags).train.steps == 25
    assert job.train.precision == "fp32"
    assert build(dataset, precision="auto", **flags).train.precision == "bf16"  # the parent's
    save_run(dataset, "old")
    flags |= {"precision": "auto", "parent": "old"}
    assert build(dataset, **flags).train.precision == "fp32"
    assert build(dataset, gpus=True, hardware="h100", **flags).train.precision == "bf16"


@pytest.mark.parametrize(
    ("workers", "threads", "speed"), [(4, 1, 40), (16, 1, 80), (4, 4, 20), (4, 3, 20), (4, 16, 10)]
)
def test_a_plan_multiplies_the_speed_of_one(
    monkeypatch: pytest.MonkeyPatch, workers: int, threads: int, speed: float
) -> None:
    """By as many of the workers as 8 cores have threads for."""
    shares: list[int] = []
    num_threads: list[int] = []

    def measure(probe: Any, *, sharing: int) -> Throughput:
        shares.append(sharing)
        return Throughput(precision="fp32", tokens_per_s=10.0)

    monkeypatch.setattr(throughput, "measure", measure)
    monkeypatch.setattr(torch, "set_num_threads", num_threads.append)
    monkeypatch.setattr(container, "cores", lambda: 8)
    probe: Any = None
    args = Args(plan_only=True, workers=workers, threads=threads)
    assert train_job.measure(args, probe).tokens_per_s == speed
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    args = Args(workers=workers, threads=threads)
    assert train_job.measure(args, probe).tokens_per_s == 10  # of all ranks together
    assert (shares, num_threads) == ([1, 2], [threads, threads])


def test_only_what_trains_here_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for elsewhere in (Args(gpus=True), Args(gpus=True, ray=False, plan_only=True)):
        assert elsewhere.gpus
    message = "gpus=True is not allowed: this machine has no CUDA device"
    with pytest.raises(ValueError, match=message):
        Args(gpus=True, ray=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert Args(gpus=True).gpus
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="this machine has 2 CUDA devices for 3 workers"):
        Args(gpus=True)


def test_the_hardware_is_that_of_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train_job.planned_hardware(Args(hardware="h100", gpus=True)).name == "h100"
    assert train_job.planned_hardware(Args()).name == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"gpus=True is not allowed: .* --hardware"):
        train_job.planned_hardware(Args(gpus=True, plan_only=True))
    monkeypatch.setattr(train_job, "_cluster_gpu", lambda workers: workers)
    assert train_job.planned_hardware(Args(gpus=True, workers=3)) == 3  # type: ignore[comparison-overlap]


def test_a_plan_needs_no_dataset(root: Store) -> None:
    """Then it counts with nanochat's vocabulary."""
    job = build(root, plan_only=True, depth=4, preset="classic")
    assert (job.model.vocab_size, job.model.n_layer) == (32_768, 4)
    assert job.model == recipe.model_config(4, 32_768, preset="classic")
    write_dataset(root, "base")
    assert build(root, plan_only=True, depth=4).model.vocab_size == TOKENIZER.vocab_size


class Runs:
    """Stands in for all that a job runs on, and remembers it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, is_done: bool = True):
        self.calls: list[tuple[str, Any]] = []
        self.job = SimpleNamespace(run="base", storage="s")
        result = {"done": is_done, "train_seconds": 61.0}
        for name, value in (
            *(("build", self.job), ("check", self.job), ("check_resume", None)),
            *(("print_plan", {"advice": ""}), ("run_here", result), ("run_on_ray", result)),
        ):
            monkeypatch.setattr(train_run, name, self.recorder(name, value))

    def recorder(self, name: str, value: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if name in ("print_plan", "run_here", "run_on_ray"):
                job, flags = args
                assert job is self.job
                assert isinstance(flags, Args)
            self.calls.append((name, (*args, *options.values())))
            return value

        return call

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def workers(self) -> int:
        return next(args[0].workers for name, args in self.calls if name == "build")  # type: ignore[no-any-return]


@pytest.mark.parametrize("is_done", [True, False])
def test_a_run_ends_with_one_object(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_done: bool
) -> None:
    runs = Runs(monkeypatch, is_done=is_done)
    assert train_run.train(Args(workers=3, resume="must")) == (0 if is_done else STOPPED)
    assert runs.names() == ["build", "check", "check_resume", "print_plan", "run_on_ray"]
    assert runs.calls[2][1] == ("s", "base", "must")
    assert runs.workers() == 3
    first, last = capsys.readouterr().out.splitlines()
    assert first == "trained in 1:01"
    assert json.loads(last) == {"run": "base", "done": is_done, "train_seconds": 61.0}


def test_without_ray_one_worker_trains_here(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Runs(monkeypatch)
    assert train_run.train(Args(workers=3, ray=False)) == 0
    assert runs.names()[-1] == "run_here"
    assert runs.workers() == 1
    plan = Runs(monkeypatch)
    train_run.train(Args(workers=3, ray=False, plan_only=True))
    assert (plan.names(), plan.workers()) == (["build", "print_plan"], 3)


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_of_torchrun_train_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    """The first one speaks; a group that was restarted may find its own run."""
    for name, value in (("LOCAL_WORLD_SIZE", 2), ("WORLD_SIZE", 4), ("RANK", rank)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    runs = Runs(monkeypatch)
    assert train_run.train(Args(workers=9)) == 0
    assert runs.workers() == 4
    assert runs.names() == ["build", "check", *(["print_plan"] if rank == 0 else []), "run_here"]
    assert len(capsys.readouterr().out.splitlines()) == (2 if rank == 0 else 0)


@pytest.mark.parametrize("has_progress", [0, 1])
def test_restarted_process_continues_the_run(
    monkeypatch: pytest.MonkeyPatch, has_progress: int
) -> None:
    """With --resume never too, once its run has begun."""
    monkeypatch.setenv(supervise.MARK, f"{os.getppid()}:{has_progress}")
    runs = Runs(monkeypatch)
    assert train_run.train(Args(restarts=1, resume="never", ray=False)) == 0
    assert ("check_resume" in runs.names()) == (not has_progress)


def test_a_plan_that_does_not_fit_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = Runs(monkeypatch)
    for advice in ("", "use more"):
        plan = {"advice": advice, "fits": not advice}
        monkeypatch.setattr(train_run, "print_plan", runs.recorder("print_plan", plan))
        assert train_run.run(Args(plan_only=True)) == 0
        *lines, last = capsys.readouterr().out.splitlines()
        assert json.loads(last) == plan
        assert lines == (["memory    does not fit: use more"] if advice else [])


@pytest.mark.parametrize("gpus", [False, True])
def test_ranks_join_one_process_group(monkeypatch: pytest.MonkeyPatch, gpus: bool) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(train_run, "has_joined_group", False)
    monkeypatch.setattr(torch.distributed, "init_process_group", calls.append)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("end"))
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)

    def join() -> list[Any]:
        calls.clear()
        with train_run.process_group(gpus=gpus):
            calls.append("block")
        return calls

    assert join() == ["block"]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join() == ["block"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert join() == [*([1, "nccl"] if gpus else ["gloo"]), "block", "end"]


@pytest.fixture
def supervisions(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    calls: list[tuple[Any, ...]] = []

    def start(restarts: int, progress: Any) -> int:
        calls.append((restarts, progress()))
        return 75

    monkeypatch.delenv(supervise.MARK, raising=False)
    monkeypatch.setattr(supervise, "supervise", start)
    monkeypatch.setattr(train_run, "run", lambda args: 3)
    return calls


def test_restarts_need_a_supervisor(
    root: Store, monkeypatch: pytest.MonkeyPatch, supervisions: list[tuple[Any, ...]]
) -> None:
    args = Args(storage=root.uri, restarts=2)
    assert train.main(args) == 75
    run = root.child("runs", "base")
    run.write_text("step-000003/manifest.json", "{}")  # killed before it wrote the file latest
    run.write_text("step-000004/config.json", "{}")
    assert train.main(args) == 75
    assert supervisions == [(2, None), (2, "step-000003")]
    assert train.main(Args(storage=root.uri)) == 3
    assert train.main(Args(storage=root.uri, restarts=2, plan_only=True)) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="restarts=2 is not allowed: not with torchrun"):
        train.main(args)
    monkeypatch.setenv(supervise.MARK, f"{os.getppid()}:0")
    assert train.main(args) == 3
    assert len(supervisions) == 2
