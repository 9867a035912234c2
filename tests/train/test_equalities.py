"""Numerics by equalities: how rows are cut or spread, and where a run stops, must not matter."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import DTYPES
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.storage import Store
from nanochat_ray.train.config import TrainConfig, TrainerConfig
from tests.processes import run_on_ranks
from tests.tiny import tiny_config, write_dataset
from tests.train.run_trainer import run_trainer

CONFIG = TrainConfig(
    steps=8,
    global_batch_size=8,
    micro_batch_size=4,
    eval_every=4,
    eval_sequences=8,
    save_every=3,
    sample_tokens=4,
    optim=OptimConfig(
        matrix_lr=0.005, embedding_lr=0.05, scalar_lr=0.05, weight_decay=0.1, grad_clip=1.0
    ),
)


def job(root: Store, run: str, stage: str = "base", **changes: Any) -> TrainerConfig:
    train = dataclasses.replace(CONFIG, stage=stage, **changes)
    return TrainerConfig(storage=root.uri, dataset=stage, run=run, model=tiny_config(), train=train)


def train_records(job: TrainerConfig, **kwargs: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    run_trainer(job, on_record=records.append, **kwargs)
    return [record for record in records if record["kind"] == "train"]


def losses(job: TrainerConfig, **kwargs: Any) -> list[float]:
    return [record["loss"] for record in train_records(job, **kwargs)]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["base", "sft"])
def test_accumulation_equals_one_big_batch(root: Store, stage: str) -> None:
    write_dataset(root, stage, stage)
    one, four = (
        train_records(job(root, f"by-{size}", stage, micro_batch_size=size, steps=4))
        for size in (8, 2)
    )
    # The first step differs by rounding. Its norm tells what a loss does not: AdamW and Muon give
    # equal weights for gradients of any size.
    for name in ("loss", "grad_norm"):
        assert one[0][name] == pytest.approx(four[0][name], rel=1e-5)
    # Where a gradient is rounding noise, AdamW brings it to full size: up to 1e-5 over the seeds.
    # Other weights change a loss by 1e-3 and more.
    assert [r["loss"] for r in one] == pytest.approx([r["loss"] for r in four], abs=2e-4)


def stop_after(steps: int) -> Callable[[], bool]:
    """What a loop is to ask so that it stops after so many steps; 0 is never."""
    calls = iter(range(1, 10**6))
    return lambda: next(calls) == steps


def _refuse_load(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a rank reads weights that rank 0 could send it")


def _train(rank: int, values: dict[str, Any], out: Path, stop: int) -> None:
    if rank > 0:
        checkpoint.load = _refuse_load  # type: ignore[assignment]
    # One rank's wish is enough.
    should_stop = stop_after(stop if rank == 1 else 0)
    rank_losses = losses(TrainerConfig.from_json(values), should_stop=should_stop)
    out.with_suffix(f".{rank}").write_text(json.dumps(rank_losses))


def losses_on_ranks(world: int, job: TrainerConfig, out: Path, stop: int = 0) -> list[list[float]]:
    run_on_ranks(_train, job.to_json(), out, stop, world=world)
    return [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(world)]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "micro", "dropout"), [("base", 2, 0.1), ("sft", 4, 0.0)])
def test_two_ranks_equal_one(
    root: Store, tmp_path: Path, stage: str, micro: int, dropout: float
) -> None:
    """Four sequences a rank: in two micro-batches with the noise of one rank, or in one."""
    write_dataset(root, stage, stage)
    model = tiny_config(dropout=dropout)
    jobs = [
        dataclasses.replace(job(root, run, stage, micro_batch_size=micro), model=model)
        for run in ("alone", "both")
    ]
    alone = losses(jobs[0])
    both = losses_on_ranks(2, jobs[1], tmp_path / "losses")
    assert both[0] == both[1]
    assert both[0] == pytest.approx(alone, abs=1e-5)
    one, two = (checkpoint.load(root.child("runs", r), optimizer=True) for r in ("alone", "both"))
    for name, weight in one.weights.items():
        # Some scalars have a gradient of rounding noise, which AdamW brings to full size: they are
        # equal only where the sums have one order.
        if micro == 4 or weight.ndim > 1:
            torch.testing.assert_close(two.weights[name], weight, atol=2e-4, rtol=1e-3)
    assert one.optimizer is not None
    assert two.optimizer is not None
    assert one.optimizer.keys() == two.optimizer.keys()
    metric = "bits_per_byte" if stage == "base" else "val_loss"
    for name in (f"first_{metric}", metric, f"best_{metric}"):
        figure = one.trainer["metrics"][name]
        assert two.trainer["metrics"][name] == pytest.approx(figure, abs=1e-5)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(root: Store) -> None:
    write_dataset(root, "base")
    run_trainer(job(root, "whole"))
    whole = checkpoint.load(root.child("runs", "whole"), optimizer=True)
    assert whole.optimizer is not None
    for stop in (1, 3, 5, 7):
        run = f"halves-{stop}"
        half = run_trainer(job(root, run), should_stop=stop_after(stop))
        assert half["step"] == stop
        assert not half["done"]
        second = run_trainer(job(root, run))
        assert second["done"]
        halves = checkpoint.load(root.child("runs", run), optimizer=True)
        assert halves.optimizer is not None
        for name, weight in whole.weights.items():
            assert torch.equal(weight, halves.weights[name]), (stop, name)
        for name, state in whole.optimizer.items():
            assert torch.equal(state, halves.optimizer[name]), (stop, name)


@pytest.mark.slow
def test_stopped_on_two_ranks_resumes_on_one(root: Store, tmp_path: Path) -> None:
    write_dataset(root, "base")
    alone = losses(job(root, "alone"))
    continuation = job(root, "moved")
    losses_on_ranks(2, continuation, tmp_path / "losses", stop=5)
    assert checkpoint.latest(root.child("runs", "moved")) == "step-000005"
    assert losses(continuation) == pytest.approx(alone[5:], abs=1e-5)


@pytest.mark.slow
def test_only_rank_0_reads_a_parent_and_a_checkpoint(root: Store, tmp_path: Path) -> None:
    write_dataset(root, "base")
    losses(job(root, "parent", steps=2))
    children = [dataclasses.replace(job(root, r), parent="parent") for r in ("whole", "halves")]
    whole = losses_on_ranks(2, children[0], tmp_path / "losses")
    first = losses_on_ranks(2, children[1], tmp_path / "losses", stop=5)
    second = losses_on_ranks(2, children[1], tmp_path / "losses")
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    one, two = (
        checkpoint.load(root.child("runs", r), optimizer=False) for r in ("whole", "halves")
    )
    assert all(torch.equal(w, two.weights[name]) for name, w in one.weights.items())


@pytest.mark.slow
def test_another_configuration_is_refused(root: Store) -> None:
    write_dataset(root, "base")
    run_trainer(job(root, "run", steps=2))
    with pytest.raises(
        ValueError, match=r"global_batch_size=4 \(from --batch-tokens\) is not what this run"
    ):
        run_trainer(job(root, "run", steps=2, global_batch_size=4))


def test_nan_gradients_reach_no_checkpoint(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dataset(root, "base")
    real, calls = GPT.loss, 0

    def with_nan(self: GPT, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += self.training
        results = real(self, *args, **kwargs)
        return results * float("nan") if self.training and calls > 7 else results

    monkeypatch.setattr(GPT, "loss", with_nan)
    with pytest.raises(FloatingPointError, match="not finite in 5 steps"):
        run_trainer(job(root, "run", steps=20, save_every=1))
    final = checkpoint.load(root.child("runs", "run"), optimizer=True)
    assert final.step <= 3
    assert all(torch.isfinite(weight).all() for weight in final.weights.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_activations_equal_plain(precision: str) -> None:
    ids = torch.randint(0, 256, (3, 33), generator=torch.Generator().manual_seed(0))
    results = []
    for recompute in (False, True):
        model = GPT(tiny_config(n_layer=3), DTYPES[precision])
        model.init_weights(torch.Generator().manual_seed(1))
        for p in model.parameters():  # blocks begin as the identity, with gradients of zero
            p.data += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
        assert not model.checkpoint_activations
        model.checkpoint_activations = recompute
        model.train()
        calls: list[int] = []
        for block in model.blocks:
            block.attn.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model.loss(ids[:, :-1], ids[:, 1:].contiguous(), reduction="mean").backward()
        assert len(calls) == (6 if recompute else 3)
        results.append({name: p.grad for name, p in model.named_parameters()})
    plain, again = results
    for name, grad in plain.items():
        assert grad is not None
        assert again[name] is not None, name
        assert torch.equal(grad, again[name]), name


@pytest.mark.slow
def test_activation_checkpoints_may_start_late(root: Store) -> None:
    write_dataset(root, "base")
    run_trainer(job(root, "whole"))
    run_trainer(job(root, "halves"), should_stop=stop_after(4))
    run_trainer(job(root, "halves", checkpoint_activations=True, deterministic=True))
    torch.use_deterministic_algorithms(False)
    one, two = (
        checkpoint.load(root.child("runs", r), optimizer=False) for r in ("whole", "halves")
    )
    assert all(torch.equal(w, two.weights[name]) for name, w in one.weights.items())
