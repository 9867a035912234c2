"""How long a run is: measured once, and the same whenever it is resumed."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.cli import train_job
from nanochat_ray.cli.train import Args
from nanochat_ray.storage import Store
from nanochat_ray.train import throughput
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from nanochat_ray.train.throughput import Probe, RunPlan, Throughput, plan_length
from tests.tiny import tiny_config, write_dataset
from tests.train.run_trainer import run_trainer

MODEL = tiny_config()


class Machine:
    """A machine of a given speed; counts how often it is measured."""

    def __init__(self, tokens_per_s: float):
        self.tokens_per_s, self.measurements = tokens_per_s, 0

    def __call__(self, probe: Probe) -> Throughput:
        self.measurements += 1
        return Throughput(precision="fp32", tokens_per_s=self.tokens_per_s)


@pytest.fixture
def run(root: Store) -> Store:
    return root.child("runs", "run")


def test_real_steps_are_measured() -> None:
    result = throughput.measure(Probe(model=MODEL, minutes=0.01), seconds=0.05)
    assert result.precision in ("bf16", "fp32")
    assert result.tokens_per_s > 0
    assert result.tokens_in(2.0) == pytest.approx(2 * result.tokens_in(1.0), abs=1)


@pytest.mark.parametrize(
    ("step_s", "seconds", "times"),
    [
        # The first step sets everything up and does not count; then at least two do.
        (0.5, 0.0, [0.5, 0.5]),
        (0.5, 2.0, [0.5] * 4),
        (2.0, 0.0, [2.0, 2.0]),
        (2.5, 9.0, [2.5]),  # a first step that is slow is the whole measurement
    ],
)
def test_steps_are_measured_as_long_as_asked(
    step_s: float, seconds: float, times: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    shapes: set[tuple[int, ...]] = set()

    def step(model: Any, optimizer: Any, batch: Any, *_: Any) -> None:
        nonlocal now
        now += step_s
        shapes.add(batch.ids.shape)

    monkeypatch.setattr(throughput, "train_step", step)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: now)
    train = TrainConfig(steps=1, global_batch_size=6, micro_batch_size=2)
    assert throughput._step_seconds(MODEL, train, seconds, 1) == times
    assert shapes == {(6, MODEL.sequence_len + 1)}


def test_rates_are_tokens_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of single steps, then the mean over steps of the planned batch."""
    batches = []

    def steps(model: Any, train: TrainConfig, seconds: float, sharing: int) -> list[float]:
        batches.append((train.global_batch_size, seconds, sharing))
        return [0.5, 0.25, 0.75]

    monkeypatch.setattr(throughput, "_step_seconds", steps)
    alone = throughput.measure(Probe(model=MODEL, precision="fp32"), sharing=2)
    assert alone == Throughput(precision="fp32", tokens_per_s=32 / 0.25)
    assert batches == [(1, 0.0, 2)]
    probe = Probe(model=MODEL, precision="bf16", minutes=1.0, batch_tokens=128)
    result = throughput.measure(probe, seconds=3.0)
    assert result == Throughput(precision="bf16", tokens_per_s=128 * 3 / 1.5)
    assert batches[1:] == [(1, 0.0, 1), (4, 3.0, 1)]
    assert result.tokens_in(2.0) == int(120 * 0.9 * 256)


@pytest.mark.parametrize("slow", ["bf16", "fp32"])
def test_the_faster_precision_is_taken(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Other work comes between all steps but one.
    monkeypatch.setattr(
        throughput,
        "_step_seconds",
        lambda model, train, *_: [9.0, 2 - (train.precision != slow), 9.0],
    )
    assert (
        throughput.measure(Probe(model=MODEL)).precision == {"bf16": "fp32", "fp32": "bf16"}[slow]
    )
    assert throughput.measure(Probe(model=MODEL, precision="bf16")).precision == "bf16"


def test_batch_follows_from_its_own_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def steps(model: Any, train: Any, *_: Any) -> list[float]:
        batches.append(train.global_batch_size)
        # Every step has a second's work for the optimizer, and little for each row.
        return [1 + train.global_batch_size / 1000] * 2

    monkeypatch.setattr(throughput, "_step_seconds", steps)
    model = tiny_config(n_layer=4, n_embd=256, sequence_len=512)
    result = throughput.measure(Probe(model=model, precision="fp32", minutes=60.0))
    assert batches[0] == 1
    assert batches == sorted(batches)
    assert len(set(batches)) > 2
    assert len(batches) <= 1 + throughput.ROUNDS
    assert result.tokens_per_s == pytest.approx(512 * batches[-1] / (1 + batches[-1] / 1000))


def test_half_the_speed_is_half_the_tokens(root: Store) -> None:
    probe = Probe(model=MODEL, minutes=5.0)
    one, two = (
        plan_length(root.child("runs", str(rate)), probe, 10**9, 2, Machine(rate))
        for rate in (1000.0, 2000.0)
    )
    assert two.tokens == 2 * one.tokens == int(5 * 60 * 2000 * throughput.SHARE_OF_STEPS)
    assert plan_length(root.child("runs", "few"), probe, 99, 2, Machine(1e9)).tokens == 99


def test_a_plan_is_measured_once(run: Store) -> None:
    probe, machine = Probe(model=MODEL, minutes=5.0), Machine(1000.0)
    first = plan_length(run, probe, 10**9, 2, machine)
    machine.tokens_per_s = 7.0
    assert plan_length(run, probe, 10**9, 4, machine) == first
    assert machine.measurements == 1
    # Without a checkpoint another model or time is another plan.
    for other in (
        dataclasses.replace(probe, minutes=9.0),
        dataclasses.replace(probe, model=tiny_config(n_layer=1)),
    ):
        assert plan_length(run, other, 10**9, 2, machine).tokens != first.tokens
    run.write_text("plan.json", '{"plan": {"tok')
    assert plan_length(run, probe, 10**9, 2, Machine(1000.0)) == first


def train(root: Store, **flags: Any) -> TrainerConfig:
    settings = {"storage": root.uri, "ray": False, "depth": 1, "batch_tokens": 128}
    settings["train"] = {"sample_tokens": 0}
    return train_job.build(Args(**{**settings, **flags}))


@pytest.mark.slow
def test_a_begun_run_keeps_its_plan(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(root, "base")
    rate = 16.0
    monkeypatch.setattr(
        throughput, "measure", lambda probe, **_: Throughput(precision="fp32", tokens_per_s=rate)
    )
    began = train(root, cpu_minutes=1.0, workers=2)
    assert began.train.steps == round(60 * 16 * throughput.SHARE_OF_STEPS / 128)
    assert began.train.precision == "fp32"
    run_trainer(began, should_stop=iter([False, True]).__next__)
    run = root.child("runs", "base")
    assert checkpoint.latest(run) == "step-000002"
    rate = 1e6  # a faster machine, other workers, or a note that was lost
    for workers in (1, 3):
        again = train(root, cpu_minutes=1.0, workers=workers)
        assert (
            dataclasses.replace(again.train, micro_batch_size=began.train.micro_batch_size)
            == began.train
        )
    with pytest.raises(ValueError, match=r"cpu_minutes=3 is not what this run was started with"):
        train(root, cpu_minutes=3.0)
    run.delete("plan.json")
    assert train(root, cpu_minutes=1.0).train == began.train
    assert run_trainer(again)["done"]


def test_sft_takes_its_parents_precision(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in ("base", "sft"):
        write_dataset(root, stage, stage, length=32)
    monkeypatch.setattr(
        throughput,
        "measure",
        lambda probe, **_: Throughput(precision=probe.precision, tokens_per_s=16.0),
    )
    run_trainer(train(root, tokens=256, precision="fp32"))
    flags = {"stage": "sft", "depth": None}
    whole = train(root, **flags)
    assert whole.train.precision == "fp32"
    assert whole.train.steps == round(50 / 4)
    short = train(root, cpu_minutes=0.5, **flags)
    assert short.train.steps == int(30 * 16 * throughput.SHARE_OF_STEPS) // 128
    assert short.train.precision == "fp32"
    assert train(root, cpu_minutes=50.0, **flags).train == whole.train


def test_the_plan_says_what_was_measured(
    root: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(root, "base")
    monkeypatch.setattr(
        throughput, "measure", lambda probe, **_: Throughput(precision="fp32", tokens_per_s=16.0)
    )
    args = Args(storage=root.uri, ray=False, depth=1, batch_tokens=128, cpu_minutes=1.0, workers=1)
    description = train_job.print_plan(train_job.build(args), args)
    assert description["measured_tokens_per_s"] == 16.0
    assert description["hours"] * 60 == pytest.approx(throughput.SHARE_OF_STEPS, rel=0.15)
    assert "at 16 tokens/s of all workers (measured)" in capsys.readouterr().out


def test_notes_are_plain_json(run: Store) -> None:
    plan = RunPlan(precision="bf16", tokens=5, batch_tokens=1, cpu_minutes=2.5)
    throughput.store_plan(run, MODEL, plan)
    assert json.loads(run.read_text("plan.json"))["plan"]["cpu_minutes"] == 2.5
    assert throughput.stored_plan(run, MODEL) == plan
