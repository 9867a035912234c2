"""A run has one identity: what shapes its steps stays as it was; what does not may change."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checkpoint.reader import FORMAT, CheckpointReader
from nanochat_ray.claim import ClaimLostError
from nanochat_ray.config import RENAMED_FIELDS
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from nanochat_ray.train.preflight import check
from tests.tiny import TOKENIZER, tiny_config, write_dataset
from tests.train.run_trainer import run_trainer

TRAIN = TrainConfig(
    steps=4,
    global_batch_size=4,
    micro_batch_size=2,
    save_every=2,
    eval_every=100,
    eval_sequences=4,
    sample_tokens=0,
    precision="fp32",
    keep_latest_k=9,
)


def job(root: Store, **changes: Any) -> TrainerConfig:
    """Fields of the job, or of its ``train`` and ``model`` as ``train__x`` and ``model__x``."""
    inner: dict[str, dict[str, Any]] = {"train": {}, "model": {}}
    for name in [name for name in changes if "__" in name]:
        part, _, field = name.partition("__")
        inner[part][field] = changes.pop(name)
    fields: dict[str, Any] = {
        "storage": root.uri,
        "dataset": "base",
        "run": "run",
        "model": tiny_config(**inner["model"]),
        "train": dataclasses.replace(TRAIN, **inner["train"]),
    }
    return TrainerConfig(**fields | changes)


@pytest.fixture(scope="module")
def half_run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Store.at(str(tmp_path_factory.mktemp("half")))
    write_dataset(root, "base")
    stops = iter([False, True])
    run_trainer(check(job(root)), should_stop=lambda: next(stops, True))
    assert checkpoint.latest(root.child("runs", "run")) == "step-000002"
    return Path(root.root)


@pytest.fixture
def half_run(root: Store, half_run_folder: Path) -> Store:
    """A root with a run that stopped after 2 of its 4 steps."""
    shutil.copytree(half_run_folder, root.root)
    return root


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model__softcap": 1.0}, "softcap"),
        ({"model__rope_base": 500.0}, "rope_base"),
        ({"model__dropout": 0.3}, "dropout"),
        ({"model__skips": True}, "skips"),
        ({"model__n_layer": 3}, "n_layer"),
        ({"train__steps": 5}, "steps"),
        ({"train__global_batch_size": 2}, "global_batch_size"),
        ({"train__seed": 1}, "seed"),
        ({"train__precision": "bf16"}, "precision"),
        ({"train__optim": OptimConfig(momentum=0.5)}, "momentum"),
    ],
)
def test_what_shapes_steps_is_refused(half_run: Store, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}=.* is not what this run was started with \("):
        check(job(half_run, **changes))
    with pytest.raises(ValueError, match=rf"^{field}="):
        run_trainer(job(half_run, **changes))


def test_all_that_differs_is_listed(half_run: Store) -> None:
    config = job(half_run, train__steps=5, train__seed=1, model__n_layer=3)
    with pytest.raises(ValueError, match="n_layer=3") as refusal:
        check(config)
    assert str(refusal.value) == (
        "n_layer=3 (from --depth) is not what this run was started with (2), and neither are "
        "steps=5 (4), seed=1 (0): give run 'run' the same values, or train another run"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"train__micro_batch_size": 1},
        {"train__save_every": 3},
        {"train__eval_every": 1},
        {"train__keep_latest_k": 1},
        {"train__sample_tokens": 2},
        {"train__checkpoint_activations": True},
    ],
)
def test_resumable_fields_may_change(half_run: Store, changes: dict[str, Any]) -> None:
    assert run_trainer(check(job(half_run, **changes)))["done"]


def test_other_data_is_refused_by_content(half_run: Store) -> None:
    write_dataset(half_run, "copy")
    check(job(half_run, dataset="copy"))  # the same rows under another name
    write_dataset(half_run, "other", seed=1)
    with pytest.raises(ValueError, match=r"^dataset='other' \(.*content [0-9a-f]{16}\) is not"):
        check(job(half_run, dataset="other"))
    write_dataset(half_run, "base", seed=1)  # prepared again, of other text
    with pytest.raises(ValueError, match=r"^dataset='base' \(.*content"):
        check(job(half_run))


@pytest.mark.slow
def test_other_parent_content_is_refused(root: Store) -> None:
    write_dataset(root, "base")
    write_dataset(root, "sft", "sft")
    for run, seed in (("one", 0), ("two", 1)):
        run_trainer(check(job(root, run=run, train__seed=seed)))
    child = job(root, run="chat", dataset="sft", parent="one", train__stage="sft")
    assert run_trainer(check(child))["done"]
    check(child)
    with pytest.raises(ValueError, match=r"^parent='two' \('two' at step-000004, content"):
        check(dataclasses.replace(child, parent="two"))
    root.delete("runs/one")  # a parent that is gone keeps nobody from resuming
    check(child)


def test_older_checkpoints_resume_with_note(
    half_run: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = checkpoint.load_trainer

    def older(*args: Any, **kwargs: Any) -> dict[str, Any]:
        trainer = real(*args, **kwargs)
        return {**trainer, "about": {"dataset": "base", "parent": ""}}

    monkeypatch.setattr(checkpoint, "load_trainer", older)
    assert run_trainer(check(job(half_run)))["done"]
    assert "its checkpoint does not say what was in dataset 'base'" in caplog.text


def test_an_option_of_another_program_is_refused(
    half_run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.load_trainer

    def of_a_branch(*args: Any, **kwargs: Any) -> dict[str, Any]:
        trainer = real(*args, **kwargs)
        trainer["train_config"]["optim"]["table_rule"] = "lion"
        return trainer

    monkeypatch.setattr(checkpoint, "load_trainer", of_a_branch)
    with pytest.raises(ValueError, match=r"^table_rule=None is not what .* \('lion'\)"):
        check(job(half_run))


def test_last_step_divergence_saves_nothing(
    half_run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nanochat_ray.optim import flat

    real = flat.FlatGroup.update
    calls = []

    def nan_loss(self: Any, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        calls.append(self)
        if len(calls) > len({id(group) for group in calls}):  # the second and last step
            self.weights.fill_(math.nan)

    monkeypatch.setattr(flat.FlatGroup, "update", nan_loss)
    with pytest.raises(FloatingPointError, match=r"diverged at step 4: .* nan.*step-000002"):
        run_trainer(check(job(half_run)))
    run = half_run.child("runs", "run")
    assert checkpoint.latest(run) == "step-000002"
    assert not run.exists("step-000004/manifest.json")


@pytest.mark.parametrize("damage", [None, "", "step-000099\n", "no such name"])
def test_newest_complete_checkpoint_wins(half_run: Store, damage: str | None) -> None:
    run = half_run.child("runs", "run")
    run.delete("latest")
    if damage is not None:
        run.write_text("latest", damage)
    (Path(run.root) / "step-000002-good").mkdir()
    (Path(run.root) / "step-000009").mkdir()  # one that was never finished
    run.write_text("metrics.jsonl", '{"kind": "train", "st')
    assert checkpoint.latest(run) == "step-000002"
    first: list[dict[str, Any]] = []
    assert run_trainer(check(job(half_run)), on_record=first.append)["done"]
    assert first[0]["step"] == 3
    assert checkpoint.latest(run) == "step-000004"
    assert (Path(run.root) / "step-000002-good").is_dir()


def test_lost_claim_publishes_nothing(half_run: Store) -> None:
    def raise_lost() -> None:
        raise ClaimLostError("another job has taken over")

    with pytest.raises(ClaimLostError):
        run_trainer(check(job(half_run)), check_publish=raise_lost)
    assert checkpoint.latest(half_run.child("runs", "run")) == "step-000002"


@pytest.mark.slow
def test_resumed_run_equals_uninterrupted(half_run: Store) -> None:
    run_trainer(check(job(half_run)))
    run_trainer(check(job(half_run, run="whole")))
    runs = (checkpoint.load(half_run.child("runs", r), optimizer=False) for r in ("run", "whole"))
    one, other = (c.weights for c in runs)
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_checkpoints_with_old_names_resume(
    half_run: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert FORMAT == "nanochat_ray snapshot 1"  # what is on disk
    read = CheckpointReader.object
    names = {new: old for table in RENAMED_FIELDS.values() for old, new in table.items()}

    def with_old_names(reader: Any, file: str) -> Any:
        values = read(reader, file)
        if file == "trainer.json":
            train = values["train_config"]
            train["optim"] = {names.get(k, k): v for k, v in train["optim"].items()}
            values["train_config"] = {names.get(k, k): v for k, v in train.items()}
            assert "batch_rows" in values["train_config"]
        return values

    monkeypatch.setattr(CheckpointReader, "object", with_old_names)
    with pytest.raises(
        ValueError, match=r"^global_batch_size=2 .*is not what this run was started"
    ):
        check(job(half_run, train__global_batch_size=2))
    assert run_trainer(check(job(half_run)))["done"]


@pytest.mark.parametrize(
    ("trainer", "error"),
    [
        ({}, "run 'run' was not trained here but imported .*: it has no optimizer state"),
        ({"train_config": 3}, r"trainer\.json has no train_config"),
    ],
)
def test_an_imported_run_is_not_resumed(root: Store, trainer: dict[str, Any], error: str) -> None:
    write_dataset(root, "base")
    checkpoint.save(
        root.child("runs", "run"),
        1,
        model_config=tiny_config(),
        weights={"w": torch.zeros(1)},
        optimizer=None,
        trainer=trainer,
        tokenizer=TOKENIZER,
    )
    with pytest.raises(ValueError, match=error):
        check(job(root))
