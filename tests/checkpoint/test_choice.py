"""Which checkpoint is the latest, the best, the one that a user names, and which are deleted."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checkpoint.lease import Lease
from nanochat_ray.storage import Store
from tests.tiny import TOKENIZER, tiny_config


def save(run: Store, step: int, metric: float | None = None) -> None:
    checkpoint.save(
        run,
        step,
        model_config=tiny_config(),
        weights={"w": torch.full((2,), float(step))},
        optimizer=None,
        trainer={},
        tokenizer=TOKENIZER,
        val_metric=metric,
    )


def folders(run: Store) -> list[int]:
    return sorted(checkpoint.step_of(name) for name in checkpoint.names(run))


def test_the_best_has_the_lowest_metric(root: Store) -> None:
    for step, metric in ((1, None), (2, 3.0), (3, 1.5), (4, 2.0), (5, math.nan), (6, math.inf)):
        save(root, step, metric)
    assert checkpoint.best(root) == "step-000003"
    metrics = {"step-000002": 3.0, "step-000003": 1.5, "step-000004": 2.0}
    assert checkpoint.val_metrics(root) == metrics
    assert checkpoint.val_metric(root, "step-000004") == 2.0
    assert checkpoint.val_metric(root, "step-000001") is None
    root.write_text("step-000003/manifest.json", "{damaged")
    assert checkpoint.best(root) == "step-000004"


def test_a_user_names_a_checkpoint(root: Store) -> None:
    with pytest.raises(ValueError, match=r"run .* has no checkpoint$"):
        checkpoint.resolve(root)
    save(root, 2)
    with pytest.raises(ValueError, match=r"checkpoint='best' .*: no validation was kept"):
        checkpoint.resolve(root, "best")
    save(root, 10, 1.0)
    save(root, 12)
    root.write_text("step-000013/config.json", "{}")  # incomplete
    assert checkpoint.resolve(root) == "step-000012"
    assert checkpoint.resolve(root, "best") == "step-000010"
    assert checkpoint.resolve(root, "step-000002") == "step-000002"
    with pytest.raises(
        ValueError,
        match=r"checkpoint='step-000003' .*: it has step-000012, step-000010, step-000002$",
    ):
        checkpoint.resolve(root, "step-000003")


@pytest.mark.parametrize(
    ("keep", "keep_best", "golden"),
    [
        (1, False, [5, 6]),
        (2, False, [4, 5, 6]),
        (3, False, [2, 4, 5, 6]),
        (9, False, [1, 2, 4, 5, 6]),
        (1, True, [2, 5, 6]),
        (3, True, [2, 4, 5, 6]),
    ],
)
def test_old_checkpoints_are_deleted(
    root: Store, keep: int, keep_best: bool, golden: list[int]
) -> None:
    """Of 1 to 5 the third is incomplete, and so is 6, which is newer than the latest."""
    for step, metric in ((1, 3.0), (2, 1.0), (3, None), (4, None), (5, 2.0)):
        save(root, step, metric)
    root.delete("step-000003/manifest.json")
    root.write_text("step-000006/config.json", "{}")
    checkpoint.prune(root, keep, keep_best=keep_best)
    assert folders(root) == golden


def test_a_leased_checkpoint_stays(root: Store) -> None:
    for step in (1, 2, 3):
        save(root, step)
    lease = Lease(root, "one")
    lease.hold(["step-000001"])
    checkpoint.prune(root, 1)
    assert folders(root) == [1, 3]
    lease.release()
    checkpoint.prune(root, 1)
    assert folders(root) == [3]
    checkpoint.prune(root.child("none"), 1)  # nothing to do


def test_a_tensor_that_is_not_finite_is_not_saved(root: Store) -> None:
    save(root, 1)
    for weights, optimizer, name in (
        ({"w": torch.tensor([1.0, math.inf])}, None, "weights: w"),
        ({"w": torch.ones(1)}, {"m": torch.tensor(math.nan)}, "optimizer state: m"),
    ):
        with pytest.raises(FloatingPointError, match=f"^{name} is not finite after step 2"):
            checkpoint.save(
                root,
                2,
                model_config=tiny_config(),
                weights=weights,
                optimizer=optimizer,
                trainer={},
                tokenizer=TOKENIZER,
            )
    assert folders(root) == [1]


def test_a_write_that_fails_publishes_nothing(root: Store) -> None:
    save(root, 1)

    def refuse() -> None:
        raise RuntimeError("the claim is lost")

    for step in (1, 2):  # 1 is written again, and incomplete from then on
        with pytest.raises(RuntimeError, match="claim"):
            checkpoint.save(
                root,
                step,
                model_config=tiny_config(),
                weights={"w": torch.ones(2)},
                optimizer=None,
                trainer={},
                tokenizer=TOKENIZER,
                check_publish=refuse,
            )
    assert checkpoint.latest(root) is None
    assert Path(root.root, "step-000002", "weights.msgpack").exists()
    assert root.read_text("latest") == "step-000001"


def test_versions_name_the_weights(root: Store) -> None:
    save(root, 1)
    digest = checkpoint.weights_digest(root, "step-000001")
    assert checkpoint.weight_version(root, "step-000001") == f"step-000001-{digest[:8]}"
