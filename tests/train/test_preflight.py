"""What a GPU cannot run is refused by name, before or when a worker starts."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_ray import machine
from nanochat_ray.storage import Store
from nanochat_ray.train import memory, preflight, trainer
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from tests.tiny import tiny_config, write_dataset
from tests.train.run_trainer import run_trainer


def config(root: Store, **train: Any) -> TrainerConfig:
    fields: dict[str, Any] = {"steps": 2, "global_batch_size": 4, "micro_batch_size": 2}
    return TrainerConfig(
        storage=root.uri,
        dataset="base",
        run="run",
        model=tiny_config(),
        train=TrainConfig(**{**fields, "precision": "bf16", **train}),
    )


def test_fp8_needs_compilation() -> None:
    fields: dict[str, Any] = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    TrainConfig(**fields, precision="bf16", fp8=True)
    with pytest.raises(ValueError, match="fp8=True is not allowed: not with compile=off"):
        TrainConfig(**fields, precision="bf16", fp8=True, compile="off")


def test_fp8_needs_aligned_sequences(root: Store) -> None:
    write_dataset(root, "base")  # sequences of 32 tokens
    preflight.check(config(root, fp8=True), on_gpu=True)
    write_dataset(root, "odd", length=20)
    odd = dataclasses.replace(config(root, fp8=True), dataset="odd")
    with pytest.raises(ValueError, match="multiple of 16 tokens; those of dataset 'odd' have 20"):
        preflight.check(odd, on_gpu=True)


def test_bf16_heads_are_aligned_on_a_gpu(root: Store) -> None:
    write_dataset(root, "base")
    narrow = config(root)
    model = dataclasses.replace(narrow.model, n_embd=24, n_head=2, n_kv_head=2)
    narrow = dataclasses.replace(narrow, model=model)
    preflight.check(narrow)
    with pytest.raises(ValueError, match="n_head=2 is not allowed: n_embd=24 over n_head must be"):
        preflight.check(narrow, on_gpu=True)


def test_fp8_needs_a_recent_gpu(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fp8=True is not allowed: only on a GPU"):
        preflight.check_device(config(root, fp8=True), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"capability 8.9 or higher, and A100 has 8\.0"):
        preflight.check_device(config(root, fp8=True), torch.device("cuda"))


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(ValueError, match=rf"Python's headers \({tmp_path}/Python.h\)"):
        machine.check_triton_toolchain()
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(ValueError, match=r"needs a C compiler .* apt install gcc python3"):
        machine.check_triton_toolchain()
    monkeypatch.setenv("CC", "/opt/cc")
    machine.check_triton_toolchain()


@pytest.mark.parametrize("is_frozen", [False, True])
def test_garbage_collection_is_frozen_in_steps(
    is_frozen: bool, root: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process that has not frozen its objects itself they are searched again behind a run."""
    write_dataset(root, "base")
    counts: list[int] = []
    step = trainer.train_step

    def count_frozen(*args: Any, **kwargs: Any) -> Any:
        counts.append(gc.get_freeze_count())
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer, "train_step", count_frozen)
    gc.unfreeze()
    try:
        if is_frozen:
            gc.freeze()
        run_trainer(config(root, precision="fp32"))
        assert (gc.get_freeze_count() > 10_000) == is_frozen
    finally:
        gc.freeze()  # as tests/conftest.py
    assert len(counts) == 2
    assert min(counts) > 10_000


def test_out_of_memory_is_not_retried(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(root, "base")

    def raise_error(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(trainer, "train_step", raise_error)
    # A ValueError: Ray Train restarts after other errors.
    with pytest.raises(
        memory.DoesNotFitError, match=r"micro_batch_size=\d+: cpu ran out of memory"
    ):
        run_trainer(config(root))
