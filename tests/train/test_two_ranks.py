"""Two ranks of a real process group against one process with the sum of their gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from nanochat_ray.data.shards import Manifest
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim import flat, sharded
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.storage import Store
from nanochat_ray.train.step import Batch, RankVotes, train_step
from nanochat_ray.train.validation import Validator, bits_per_byte, masked_loss
from tests.processes import run_on_ranks
from tests.tiny import TOKENIZER, write_dataset
from tests.train.test_step import CONFIG, random_batch, random_model

OPTIM = OptimConfig(matrix_lr=0.02, embedding_lr=0.1, scalar_lr=0.1, weight_decay=0.1)
STEPS = 3


def gradients(model: GPT, step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def update(optimizer: ShardedOptimizer, model: GPT, step: int, ranks: list[int]) -> float:
    """One step from the gradients of ``ranks``, halved and clipped; the norm before."""
    optimizer.zero_grad()
    for rank in ranks:
        for name, gradient in gradients(model, step, rank).items():
            p = model.get_parameter(name)
            assert p.grad is not None
            p.grad += gradient
    norm = optimizer.step(step, lr_factor=0.5, momentum=0.9, scale=0.5, clip=100.0)
    return float(norm)


def assert_near(actual: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == reference.keys()
    for name, tensor in reference.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


def check_optimizer(rank: int, file: Path, scatters: bool) -> None:
    flat.BUCKET = 3000  # several for each rank
    reference: dict[str, Any] = torch.load(file)
    model = random_model(seed=rank, n_layer=4)  # rank 0 sends its weights to the others
    optimizer = ShardedOptimizer(model, OPTIM)
    assert len(optimizer._buckets) > 12
    optimizer._scatters = scatters
    reductions: list[torch.Tensor] = []
    reduce = dist.reduce

    def record(tensor: torch.Tensor, **kwargs: Any) -> Any:
        reductions.append(tensor)
        return reduce(tensor, **kwargs)

    sharded.dist.reduce = record
    for step in range(STEPS):
        norm = update(optimizer, model, step, [rank])
        assert norm == pytest.approx(reference["norms"][step], rel=1e-5)
    sharded.dist.reduce = reduce
    num_matrix_buckets = sum(bucket.owner >= 0 for bucket in optimizer._buckets)
    assert len(reductions) == STEPS * num_matrix_buckets * scatters
    assert_near(dict(model.named_parameters()), reference["weights"])
    state = optimizer.state_dict()
    assert_near(state, reference["state"])

    again = random_model(n_layer=4)
    again_optimizer = ShardedOptimizer(again, OPTIM)
    again_optimizer.load_state_dict(state)
    for name, tensor in again_optimizer.state_dict().items():
        assert torch.equal(tensor, state[name]), name

    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.zero_grad()
    if rank == 1:
        model.lm_head.weight.grad[3, 4] = torch.nan
    assert not optimizer.step(STEPS, lr_factor=1.0, momentum=0.9).isfinite()
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def check_overlap(rank: int) -> None:
    """Reductions start within the last backward pass, and not before."""
    model = random_model()
    optimizer = ShardedOptimizer(model, OPTIM)
    launched_buckets: list[int] = []
    launch = optimizer._launch

    def record(bucket: flat.Bucket) -> None:
        launched_buckets.append(bucket.start)
        launch(bucket)

    optimizer._launch = record  # type: ignore[method-assign]
    ids = torch.from_numpy(random_batch(rank, False).ids.astype(np.int64))
    num_buckets = len(optimizer._buckets)
    for _ in range(2):
        optimizer.last_backward()  # of a step that failed
        launched_buckets.clear()
        optimizer.zero_grad()
        for count in (0, num_buckets):
            if count:
                optimizer.last_backward()
            model.loss(ids[:, :-1], ids[:, 1:].contiguous(), reduction="mean").backward()
            assert len(launched_buckets) == count
        optimizer.step(0, lr_factor=1.0, momentum=0.9)
        assert len(launched_buckets) == num_buckets


def check_ranks(rank: int, file: Path) -> None:
    for scatters in (False, True):  # by all-reduce, and by the calls that are made on GPUs
        check_optimizer(rank, file, scatters)
    check_overlap(rank)


@pytest.mark.slow
def test_an_update_is_that_of_the_summed_gradients(tmp_path: Path) -> None:
    model = random_model(seed=0, n_layer=4)
    optimizer = ShardedOptimizer(model, OPTIM)
    norms = [update(optimizer, model, step, [0, 1]) for step in range(STEPS)]
    assert min(norms) > 100  # they are clipped
    weights = {name: p.detach() for name, p in model.named_parameters()}
    reference = {"norms": norms, "weights": weights, "state": optimizer.state_dict()}
    torch.save(reference, tmp_path / "reference")
    run_on_ranks(check_ranks, tmp_path / "reference")


def check_step_and_validation(
    rank: int, reference: dict[str, Any], uri: str, manifests: dict[str, str]
) -> None:
    whole = random_batch(1, True)
    assert whole.mask is not None
    half = slice(2 * rank, 2 * rank + 2)
    batch = Batch(whole.ids[half], whole.mask[half])
    config = dataclasses.replace(CONFIG, micro_batch_size=1, eval_sequences=5)
    model = random_model(dropout=0.5).train()
    optimizer = ShardedOptimizer(model, config.optim)
    result = train_step(
        model, optimizer, batch, 3, config, votes=RankVotes(stop=rank == 1, poll=rank == 0)
    )
    assert result.loss == pytest.approx(reference["loss"], rel=1e-5)
    assert result.grad_norm == pytest.approx(reference["grad_norm"], rel=1e-4)
    assert result.trained_tokens == reference["trained_tokens"]
    assert result.votes == (True, True, False, False)

    model = random_model(1).eval()
    lengths = np.arange(320) % 5
    figures = [
        bits_per_byte(model, batch.ids, lengths, micro_batch_size=1),
        masked_loss(model, batch.ids, batch.mask, micro_batch_size=1),
    ]
    for kind, manifest in manifests.items():
        validator = Validator(
            config,
            Store.at(uri).child("datasets", kind),
            Manifest.from_json(manifest),
            TOKENIZER,
            rank,
            2,
        )
        assert len(validator.ids) == (3, 2)[rank]
        figures += validator.evaluate(model).values()
    assert figures == pytest.approx(reference["figures"], rel=1e-6)


@pytest.mark.slow
def test_two_halves_are_one_batch(root: Store) -> None:
    """The noise of dropout is that of the sequence, wherever it is computed."""
    manifests = {kind: write_dataset(root, kind, kind) for kind in ("base", "sft")}
    whole = random_batch(1, True)
    assert whole.mask is not None
    config = dataclasses.replace(CONFIG, micro_batch_size=1, eval_sequences=5)
    model = random_model(dropout=0.5).train()
    result = train_step(model, ShardedOptimizer(model, config.optim), whole, 3, config)
    reference: dict[str, Any] = {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "trained_tokens": result.trained_tokens,
    }
    model = random_model(1).eval()
    lengths = np.arange(320) % 5
    figures = [
        bits_per_byte(model, whole.ids, lengths, micro_batch_size=4),
        masked_loss(model, whole.ids, whole.mask, micro_batch_size=4),
    ]
    for kind, manifest in manifests.items():
        validator = Validator(config, root.child("datasets", kind), manifest, TOKENIZER)
        figures += validator.evaluate(model).values()
    reference["figures"] = figures
    texts = {kind: manifest.to_json() for kind, manifest in manifests.items()}
    run_on_ranks(check_step_and_validation, reference, root.uri, texts)
    assert not dist.is_initialized()
