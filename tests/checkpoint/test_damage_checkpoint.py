"""A damaged checkpoint is refused in one line that names the file; none loads as another."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from tests.damage import check_damage
from tests.tiny import TOKENIZER, tiny_config

STEP = "step-000003"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "run"
    model = GPT(tiny_config())
    model.init_weights(torch.Generator().manual_seed(0))
    checkpoint.save(
        Store.at(str(folder)),
        3,
        model_config=model.config,
        weights=dict(model.named_parameters()),
        optimizer={"x/momentum": torch.ones(3)},
        trainer={"step": 3, "train_config": {"steps": 3}, "metrics": {"loss": 1.5}},
        tokenizer=TOKENIZER,
    )
    return folder


def load(step: Path) -> tuple[checkpoint.Checkpoint, GPT]:
    """As resuming and as serving do, from a copy of the checkpoint's folder alone."""
    store, name = Store.at(str(step.parent)), step.name
    return checkpoint.load(store, name, optimizer=True), checkpoint.load_model(store, name)[0]


def reseal(step: Path) -> None:
    """Makes the manifest fit the files again, as a tool that writes both would."""
    manifest = json.loads((step / "manifest.json").read_text())
    for name in manifest["files"]:
        data = (step / name).read_bytes() if (step / name).is_file() else b""
        digest = hashlib.sha256(data).hexdigest()
        manifest["files"][name] = {"size": len(data), "sha256": digest}
    (step / "manifest.json").write_text(json.dumps(manifest))


def test_no_damage_loads_or_hangs(run: Path) -> None:
    whole, model = load(run / STEP)
    weights = dict(model.named_parameters())

    def same(pair: tuple[checkpoint.Checkpoint, GPT]) -> bool:
        state, model = pair
        return (
            state.trainer == whole.trainer
            and state.model_config == whole.model_config
            and all(torch.equal(state.weights[k], v) for k, v in whole.weights.items())
            and all(torch.equal(weights[k], v) for k, v in model.named_parameters())
            and state.tokenizer.fingerprint == TOKENIZER.fingerprint
        )

    outcomes = check_damage(run / STEP, load, same=same, count=260, seed=0)
    assert outcomes["refused"] > 200


@pytest.mark.slow
def test_damage_behind_checksums_is_named(run: Path) -> None:
    """What a wrong tool wrote may load if it is valid, but never crashes and never hangs."""
    check_damage(run / STEP, load, same=lambda _: True, count=260, seed=1, reseal=reseal)


def test_special_files_as_latest_are_skipped(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    (folder / "latest").unlink()
    (folder / "latest").symlink_to("/dev/zero")
    assert checkpoint.load(Store.at(str(folder)), optimizer=False).step == 3
