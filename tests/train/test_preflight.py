"""What a GPU cannot run is refused by name, before or when a worker starts."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_ray import machine
from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.train import memory, preflight, trainer
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from tests.tiny import TOKENIZER, tiny_config, write_dataset
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


def test_rl_is_not_compiled() -> None:
    """A graph for each length of the answers of a micro-batch would be too many."""
    fields: dict[str, Any] = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1}
    for field, value in {"fp8": True, "compile": "on"}.items():
        with pytest.raises(ValueError, match=rf"^{field}={value!r} is not allowed: not in RL"):
            TrainConfig(**fields, precision="bf16", stage="rl", **{field: value})


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


def test_8_9_is_recent_enough(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr(machine, "check_triton_toolchain", lambda: calls.append(1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    for capability in ((8, 9), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        preflight.check_device(config(root, fp8=True), torch.device("cuda"))
    assert calls == [1] * 3
    preflight.check_device(config(root), torch.device("cpu"))
    assert calls == [1] * 3


@pytest.mark.parametrize(
    ("workers", "min_workers", "error"),
    [
        (8, 0, ""),
        (8, 8, ""),
        (9, 0, "workers=9 is not allowed: at most global_batch_size=8"),
        (8, 9, "min_workers=9 is not allowed: from 0 to workers=8"),
        (8, -1, "min_workers=-1 is not allowed"),
    ],
)
def test_workers_share_the_batch(root: Store, workers: int, min_workers: int, error: str) -> None:
    job = config(root, global_batch_size=8, micro_batch_size=1)
    with pytest.raises(ValueError, match=error) if error else contextlib.nullcontext():
        preflight.check_workers(job, workers, min_workers)


def save_run(root: Store, name: str, tokenizer: Tokenizer, model: ModelConfig) -> None:
    weights = dict(GPT(model).named_parameters())
    checkpoint.save(
        root.child("runs", name),
        1,
        model_config=model,
        weights=weights,
        optimizer=None,
        trainer={},
        tokenizer=tokenizer,
    )


def test_a_parent_has_a_checkpoint_and_the_tokenizer(root: Store) -> None:
    write_dataset(root, "base")
    job = dataclasses.replace(config(root), parent="parent")
    with pytest.raises(ValueError, match=r"parent='parent' has no checkpoint in"):
        preflight.check(job)
    save_run(root, "parent", TOKENIZER, job.model)
    about = preflight.check(job).about
    assert (about["parent"], about["parent_checkpoint"]) == ("parent", "step-000001")
    assert about["dataset"] == "base"
    other = Tokenizer.train(["some other text"] * 9, TOKENIZER.vocab_size + 3)
    save_run(root, "parent", other, dataclasses.replace(job.model, vocab_size=other.vocab_size))
    with pytest.raises(ValueError, match=r"parent='parent' was trained with another tokenizer"):
        preflight.check(job)


def test_a_dataset_fits_stage_model_and_length(root: Store) -> None:
    write_dataset(root, "base")  # sequences of 32 tokens
    job = config(root)
    preflight.check(job)
    for model, train, error in (
        ({}, {"stage": "sft"}, "dataset='base' was prepared for stage base, not for sft"),
        ({"vocab_size": 300}, {}, r"vocab_size=300 does not fit dataset 'base', whose tokenizer"),
        ({"sequence_len": 31}, {}, r"sequence_len=31 is shorter than the sequences of dataset"),
    ):
        other = dataclasses.replace(
            job,
            model=dataclasses.replace(job.model, **model),
            train=dataclasses.replace(job.train, **train),
        )
        with pytest.raises(ValueError, match=error):
            preflight.check(other)


@pytest.mark.parametrize("split", ["val", "train"])
def test_damaged_shards_are_found_before_a_run(
    root: Store, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(root, "base")
    Path(root.root, "datasets", "base", f"{split}-1.arrow").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=rf"shard {split}-1\.arrow of"):
        preflight.check(config(root))
    monkeypatch.setattr(preflight, "VERIFY_BYTES", 100)  # too much to read
    preflight.check(config(root))


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
