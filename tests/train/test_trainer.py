"""What a short run records and leaves, and how its model is made."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.train import trainer as trainer_module
from nanochat_ray.train.build_model import build_model, compiles
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from nanochat_ray.train.source import DatasetSource
from nanochat_ray.train.trainer import Evaluation, Trainer
from tests.tiny import TOKENIZER, tiny_config, write_dataset
from tests.train.run_trainer import FunctionHooks

CPU = torch.device("cpu")
CONFIG = TrainConfig(
    steps=5, global_batch_size=4, micro_batch_size=2, eval_sequences=2, sample_tokens=0
)


def job(root: Store, **changes: Any) -> TrainerConfig:
    write_dataset(root, "base")
    train = dataclasses.replace(CONFIG, **changes)
    return TrainerConfig(
        storage=root.uri, dataset="base", run="run", model=tiny_config(), train=train
    )


class Figures(DatasetSource):
    """The dataset's batches, with validations that are made up."""

    def __init__(self, config: TrainerConfig, values: Iterator[dict[str, float]]):
        super().__init__(config)
        self.values, self.modes = values, list[bool]()

    def evaluate(self, model: GPT) -> dict[str, float]:
        self.modes.append(model.training)
        return next(self.values)


def test_a_run_by_its_records(root: Store) -> None:
    """Windows grow at steps 1 and 2 of 5, and are whole from step 3 on."""
    records: list[dict[str, Any]] = []
    closings: list[int] = []
    hook = FunctionHooks(on_record=records.append)
    hook.close = lambda: closings.append(1)  # type: ignore[method-assign]
    config = job(root, window_warmup=0.4)
    bits = iter([{"bits_per_byte": 8.0}, {"bits_per_byte": 7.0, "other": 1.0}])
    source = Figures(config, bits)
    result = Trainer(config, source=source, hooks=[hook]).run()
    assert [(r["kind"], r["step"]) for r in records] == [
        ("eval", 0),
        *[("train", step) for step in range(1, 6)],
        ("eval", 5),
        ("save", 5),
    ]
    steps = records[1:6]
    # Steps that compile, were it compiled: a set of windows is new.
    assert [bool(r.get("warmup")) for r in steps] == [True, True, True, False, False]
    assert {(r["steps"], r["tokens"], r["trained_tokens"]) for r in steps} == {(5, 128, 128)}
    assert all(0 <= r["data_wait"] < r["seconds"] < 600 for r in steps)
    assert all(0 <= r["seconds"] < 600 for r in records if r["kind"] == "eval")
    assert source.modes == [False, False]
    assert (result["step"], result["done"], result["first_bits_per_byte"]) == (5, True, 8.0)
    assert (result["bits_per_byte"], result["other"]) == (7.0, 1.0)
    assert closings == [1]
    run = root.child("runs", "run")
    last = checkpoint.load(run, optimizer=True)
    assert (last.step, last.trainer["step"]) == (5, 5)
    about = last.trainer["about"]
    assert (about["dataset"], about["dataset_digest"]) == ("base", source.manifest.digest)
    assert checkpoint.val_metric(run, "step-000005") == 7.0
    # Another start has nothing left to train or to validate.
    again = Trainer(config, source=Figures(config, iter([]))).run()
    assert (again["step"], again["done"], again["bits_per_byte"]) == (5, True, 7.0)


def test_the_best_validation_is_below_the_others(root: Store) -> None:
    config = job(root)
    bits = (3.0, 2.0, 2.0, 2.5, 1.0)
    source = Figures(config, ({"bits_per_byte": value} for value in bits))
    trainer = Trainer(config, source=source)
    trainer.setup()
    results = [trainer.evaluate() for _ in bits]
    # The first is the untrained model's.
    assert results == [
        Evaluation(value, is_best)
        for value, is_best in zip(bits, (False, True, False, False, True), strict=True)
    ]
    assert trainer.model.training
    assert [r["kind"] for r in trainer.metrics.records] == ["eval"] * 5
    source.values = iter([{"other": 1.0}])
    assert trainer.evaluate() == Evaluation(None, False)


def test_a_run_begins_with_its_parents_weights(root: Store) -> None:
    model = GPT(tiny_config())
    model.init_weights(torch.Generator().manual_seed(5))
    values: dict[str, Any] = {
        "model_config": model.config,
        "optimizer": None,
        "trainer": {},
        "tokenizer": TOKENIZER,
    }
    run = root.child("runs", "parent")
    checkpoint.save(run, 3, weights=dict(model.named_parameters()), **values)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    checkpoint.save(run, 4, weights=zeros, **values)
    config = dataclasses.replace(job(root, checkpoint_activations=True), parent="parent")
    latest = build_model(config, root, CPU)
    assert not any(p.any() for p in latest.parameters())
    assert latest.checkpoint_activations
    older = dataclasses.replace(config, about={"parent_checkpoint": "step-000003"})
    first = build_model(older, root, CPU)
    for name, p in model.named_parameters():
        assert torch.equal(first.get_parameter(name), p)


def test_a_run_without_parent_begins_from_its_seed(root: Store) -> None:
    one, again, other = (build_model(job(root, seed=s), root, CPU) for s in (3, 3, 4))
    golden = GPT(tiny_config())
    golden.init_weights(torch.Generator().manual_seed(3))
    for model, equal in ((one, True), (again, True), (other, False)):
        assert torch.equal(model.wte.weight, golden.wte.weight) == equal
        assert not model.checkpoint_activations
    assert one.compute_dtype == torch.float32
    assert build_model(job(root, precision="bf16"), root, CPU).compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("mode", "device", "golden"),
    [
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("on", "cpu", True),
        ("off", "cuda", False),
    ],
)
def test_when_training_is_compiled(root: Store, mode: str, device: str, golden: bool) -> None:
    assert compiles(job(root, compile=mode), torch.device(device)) == golden
    if mode != "on":
        assert not compiles(job(root, compile=mode, stage="rl"), torch.device(device))


def test_a_compiled_run_says_so(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(GPT, "compile_blocks", lambda self: calls.append("compile"))
    monkeypatch.setattr(GPT, "use_fp8", lambda self: calls.append("fp8"))
    for mode in ("on", "off"):
        build_model(job(root, compile=mode), root, CPU)
    assert calls == ["compile"]
    build_model(job(root, fp8=True, precision="bf16", compile="on"), root, CPU)
    assert calls == ["compile", "fp8", "compile"]


def test_what_a_cpu_cannot_run_is_refused(root: Store) -> None:
    config = job(root, fp8=True, precision="bf16")
    with pytest.raises(ValueError, match="fp8=True is not allowed: only on a GPU"):
        Trainer(config).run()


def test_a_worker_alone_has_the_machine(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(trainer_module.machine, "use_expandable_segments", lambda: calls.append(1))
    assert Trainer(job(root)).local_world_size == 1
    assert calls == []
    Trainer(job(root), device=torch.device("cuda"))
    assert calls == [1]


@pytest.mark.parametrize("deterministic", [True, False])
def test_deterministic_algorithms_on_request(
    root: Store, deterministic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # which is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    try:
        Trainer(job(root, deterministic=deterministic)).setup()
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark != deterministic
        space = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
        assert space == (":4096:8" if deterministic else None)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("step", "every", "golden"), [(6, 3, True), (7, 3, False), (0, 3, True), (6, 0, False)]
)
def test_what_is_due(step: int, every: int, golden: bool) -> None:
    assert trainer_module._is_due(step, every) == golden
