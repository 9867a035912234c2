"""One training step against autograd on the whole batch, and validation against the definition."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.config import OptimConfig
from nanochat_ray.optim.schedule import lr_factor
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.train import step as step_module
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.step import (
    Batch,
    CrossEntropy,
    MicroBatch,
    RankVotes,
    _accumulate,
    split,
    train_step,
)
from nanochat_ray.train.validation import bits_per_byte, masked_loss
from tests.tiny import tiny_config

CONFIG = TrainConfig(
    steps=10,
    global_batch_size=4,
    micro_batch_size=4,
    optim=OptimConfig(warmup_ratio=0.2, warmdown_ratio=0.5, final_lr_frac=0.0, momentum=0.9),
)
HEAD = "lm_head.weight"


def random_model(seed: int = 0, **fields: object) -> GPT:
    model = GPT(tiny_config(**fields))
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def random_batch(seed: int, with_mask: bool) -> Batch:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 256, (4, 17), dtype=np.uint16)
    # Sequences of few and of many trained tokens: a mean of means is another number.
    share = np.array([[0.05], [0.3], [0.9], [0.5]])
    return Batch(ids, (rng.random(ids.shape) < share).astype(np.uint8) if with_mask else None)


def mean_loss(model: GPT, batch: Batch) -> Tensor:
    """Nats of each token, by the definition; the token at position t + 1 is trained at t."""
    ids = torch.from_numpy(batch.ids.astype(np.int64))
    logits = model(ids[:, :-1])
    nats = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    if batch.mask is None:
        return nats.mean()
    return nats[torch.from_numpy(batch.mask[:, 1:].astype(bool)).flatten()].mean()


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize(("seed", "with_mask"), [(0, False), (1, True), (2, True), (3, True)])
def test_step_is_that_of_the_mean_loss(seed: int, with_mask: bool, micro_batch_size: int) -> None:
    batch, model = random_batch(seed, with_mask), random_model(seed)
    loss = mean_loss(model, batch)
    grads = dict(
        zip(dict(model.named_parameters()),
            torch.autograd.grad(loss, list(model.parameters())), strict=True)
    )  # fmt: skip
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
    optimizer = ShardedOptimizer(model, CONFIG.optim)
    config = dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size)
    result = train_step(model, optimizer, batch, 0, config)
    count = 4 * 16 if batch.mask is None else int(batch.mask[:, 1:].sum())
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)
    assert (result.trained_tokens, result.weights_updated) == (count, True)
    moments = optimizer.state_dict()
    torch.testing.assert_close(moments[f"{HEAD}/momentum"], 0.2 * grads[HEAD], rtol=1e-4, atol=1e-8)
    # Muon's momentum is 0.85 at the first step.
    name = "transformer.h.1.attn.c_proj.weight"
    torch.testing.assert_close(
        moments[f"{name}/momentum"], 0.15 * grads[name], rtol=1e-3, atol=1e-7
    )


@pytest.mark.parametrize(
    ("clip", "grad_clip", "bound"),
    [(0, 0, math.inf), (0.5, 0, 0.5), (0, 0.25, 0.25), (0.5, 0.25, 0.25), (0.1, 0.25, 0.1)],
)
def test_the_smaller_bound_clips(clip: float, grad_clip: float, bound: float) -> None:
    batch, model = random_batch(0, False), random_model()
    grad = torch.autograd.grad(mean_loss(model, batch), [model.lm_head.weight])[0]
    optim = dataclasses.replace(CONFIG.optim, grad_clip=grad_clip)
    optimizer = ShardedOptimizer(model, optim)
    config = dataclasses.replace(CONFIG, optim=optim)
    norm = train_step(model, optimizer, batch, 0, config, clip=clip).grad_norm
    assert norm > 0.5
    torch.testing.assert_close(
        optimizer.state_dict()[f"{HEAD}/momentum"],
        0.2 * grad * min(1.0, bound / norm),
        rtol=1e-4,
        atol=1e-8,
    )


@pytest.mark.parametrize("step", [0, 4, 9])
def test_step_follows_the_schedule(step: int) -> None:
    model = random_model()
    before = model.lm_head.weight.detach().clone()
    optimizer = ShardedOptimizer(model, CONFIG.optim)
    factor = train_step(model, optimizer, random_batch(0, False), step, CONFIG).lr_factor
    assert factor == lr_factor(step, 10, CONFIG.optim)
    moments = optimizer.state_dict()
    first, second = (moments[f"{HEAD}/{kind}"] for kind in ("momentum", "second_moment"))
    update = (first / (1 - 0.8 ** (step + 1))) / (second / (1 - 0.96 ** (step + 1))).sqrt()
    lr = 0.008 * factor
    weight = before * (1 - lr * 0.01) - lr * update
    rows = first.abs() > 1e-6  # where epsilon does not count
    torch.testing.assert_close(model.lm_head.weight[rows], weight[rows], rtol=1e-4, atol=1e-7)


def test_no_gradient_is_left_from_the_step_before() -> None:
    model, batch = random_model(), random_batch(0, False)
    optimizer = ShardedOptimizer(model, CONFIG.optim)
    train_step(model, optimizer, batch, 0, CONFIG)
    grads = torch.autograd.grad(mean_loss(model, batch), list(model.parameters()))
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    result = train_step(model, optimizer, batch, 1, CONFIG)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)


def test_one_trained_token_is_the_mean() -> None:
    model, ids = random_model(), random_batch(0, False).ids
    mask = np.zeros(ids.shape, np.uint8)
    mask[2, 5] = 1
    batch = Batch(ids, mask)
    loss = mean_loss(model, batch)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    norm = math.sqrt(sum(g.double().square().sum().item() for g in grads))
    result = train_step(model, ShardedOptimizer(model, CONFIG.optim), batch, 0, CONFIG)
    assert result.trained_tokens == 1
    assert result.loss == pytest.approx(loss.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm, rel=1e-4)


def test_micro_batches_shift_the_mask() -> None:
    ids = np.array([[10, 11, 12, 13], [20, 21, 22, 23]], dtype=np.uint16)
    mask = np.array([[0, 1, 0, 1], [1, 0, 1, 1]], dtype=np.uint8)
    weights = np.arange(8, dtype=np.float32).reshape(2, 4)
    (one, two) = split(Batch(ids, mask, {"weights": weights}), 1, torch.device("cpu"))
    assert (one.inputs.tolist(), one.targets.tolist()) == ([[10, 11, 12]], [[11, -1, 13]])
    assert (two.inputs.tolist(), two.targets.tolist()) == ([[20, 21, 22]], [[-1, 22, 23]])
    assert two.rows.tolist() == [1, 2]
    assert two.token_inputs["weights"].tolist() == [6, 7]
    (both,) = split(Batch(ids), 2, torch.device("cpu"))
    assert both.inputs.tolist() == [[10, 11, 12], [20, 21, 22]]
    assert both.targets.tolist() == [[11, 12, 13], [21, 22, 23]]


def test_columns_behind_the_last_answer_are_cut() -> None:
    """Of sampled answers, in each micro-batch; prepared sequences keep their length."""
    ids = np.arange(28, dtype=np.int32).reshape(4, 7)
    mask = np.zeros((4, 7), dtype=np.uint8)
    mask[0, 1], mask[1, 4], mask[3, 6] = 1, 1, 1
    weights = {"weights": ids.astype(np.float32)}
    micros = list(split(Batch(ids, mask, weights), 2, torch.device("cpu")))
    assert [micro.inputs.shape[1] for micro in micros] == [4, 6]
    assert micros[0].inputs.tolist() == [[0, 1, 2, 3], [7, 8, 9, 10]]
    assert micros[0].targets.tolist() == [[1, -1, -1, -1], [-1, -1, -1, 11]]
    assert micros[0].rows.tolist() == [0, 7]
    assert micros[0].token_inputs["weights"].tolist() == [1, 11]
    for micro in split(Batch(ids, mask), 2, torch.device("cpu")):
        assert micro.inputs.shape[1] == 6
        assert micro.rows.tolist() == []
    none = Batch(ids, np.zeros_like(mask), weights)
    (micro,) = split(none, 4, torch.device("cpu"))
    assert (micro.targets == -1).all()


class WeightedLoss(CrossEntropy):
    """-sum of weight · log-probability."""

    def loss(self, model: GPT, micro: MicroBatch) -> torch.Tensor:
        logprobs = model.token_logprobs(micro.inputs, micro.targets, micro.rows)
        return -(micro.token_inputs["weights"] * logprobs).sum()

    def finish(self) -> dict[str, float]:
        return {"batches": 1.0}


def test_weight_2_is_the_token_twice() -> None:
    # A sequence whose tokens count double, against the sequence twice.
    base = random_batch(0, True)
    assert base.mask is not None
    twice = Batch(np.concatenate([base.ids, base.ids]), np.concatenate([base.mask, base.mask]))
    weights = np.full(base.ids.shape, 2.0, dtype=np.float32)
    count = float(2 * base.mask[:, 1:].sum())
    double = dataclasses.replace(base, token_inputs={"weights": weights}, denominator=count)
    results = []
    for batch, objective in ((twice, CrossEntropy()), (double, WeightedLoss())):
        model = random_model().train()
        optimizer = ShardedOptimizer(model, CONFIG.optim)
        results.append(train_step(model, optimizer, batch, 0, CONFIG, objective=objective))
    assert results[1].loss == pytest.approx(results[0].loss, rel=1e-5)
    assert results[1].grad_norm == pytest.approx(results[0].grad_norm, rel=1e-4)
    assert results[1].metrics == {"batches": 1.0}


def test_empty_batch_keeps_the_weights() -> None:
    model = random_model().train()
    optimizer = ShardedOptimizer(model, CONFIG.optim)
    train_step(model, optimizer, random_batch(0, True), 0, CONFIG)  # momentum would move them
    before = [p.detach().clone() for p in model.parameters()]
    empty = Batch(np.zeros((0, 9), dtype=np.uint16), np.zeros((0, 9), dtype=np.uint8))
    result = train_step(model, optimizer, empty, 1, CONFIG)
    assert (result.weights_updated, result.grad_norm, result.tokens) == (False, 0.0, 0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_batch_without_trained_tokens_is_a_step() -> None:
    model = random_model().train()
    optimizer = ShardedOptimizer(model, CONFIG.optim)
    train_step(model, optimizer, random_batch(0, True), 0, CONFIG)
    before = model.lm_head.weight.detach().clone()
    context = Batch(np.zeros((1, 9), dtype=np.uint16), np.zeros((1, 9), dtype=np.uint8))
    result = train_step(model, optimizer, context, 1, CONFIG)
    assert (result.weights_updated, result.grad_norm, result.loss) == (True, 0.0, 0.0)
    assert (result.tokens, result.trained_tokens) == (8, 0)
    assert not torch.equal(model.lm_head.weight, before)  # by the momentum


def test_the_smallest_batch_moves_the_weights() -> None:
    model = random_model().train()
    before = model.lm_head.weight.detach().clone()
    optimizer = ShardedOptimizer(model, CONFIG.optim)
    result = train_step(model, optimizer, Batch(np.array([[7, 9]], np.uint16)), 5, CONFIG)
    assert (result.weights_updated, result.tokens, result.trained_tokens) == (True, 1, 1)
    assert not torch.equal(model.lm_head.weight, before)


def nats(model: GPT, ids: np.ndarray) -> Tensor:
    """float64 ``[n, T]``: -log p of every token from the second on."""
    tokens = torch.from_numpy(ids.astype(np.int64))
    logs = model(tokens[:, :-1]).double().log_softmax(-1)
    return -logs.gather(2, tokens[:, 1:, None])[:, :, 0]


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_bits_per_byte_by_the_definition(micro_batch_size: int) -> None:
    model = random_model().eval()
    lengths = np.random.default_rng(0).integers(0, 4, 320)  # 0: a special token
    ids = random_batch(5, False).ids
    size = torch.from_numpy(lengths[ids[:, 1:].astype(np.int64)])
    with torch.no_grad():
        bits = (nats(model, ids) * (size > 0)).sum() / math.log(2)
    value = bits_per_byte(model, ids, lengths, micro_batch_size=micro_batch_size)
    assert value == pytest.approx((bits / size.sum()).item(), rel=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_masked_loss_by_the_definition(seed: int) -> None:
    model, batch = random_model(seed).eval(), random_batch(seed, True)
    assert batch.mask is not None
    with torch.no_grad():
        trained_nats = nats(model, batch.ids)[torch.from_numpy(batch.mask[:, 1:] == 1)]
    value = masked_loss(model, batch.ids, batch.mask, micro_batch_size=3)
    assert value == pytest.approx(trained_nats.mean().item(), rel=1e-6)


def test_uniform_model_by_hand() -> None:
    """ln 257 nats a token, whatever the text: of four bytes a token, log2(257) / 4 bits each."""
    model = random_model(vocab_size=257).eval()
    model.lm_head.weight.data.zero_()
    ids = random_batch(0, False).ids
    lengths = np.full(257, 4)
    assert bits_per_byte(model, ids, lengths, micro_batch_size=2) == pytest.approx(
        math.log2(257) / 4, rel=1e-6
    )
    mask = np.ones_like(ids)
    assert masked_loss(model, ids, mask, micro_batch_size=2) == pytest.approx(math.log(257))
    one = np.array([[3, 5]])
    assert bits_per_byte(model, one, lengths // 4, micro_batch_size=2) == pytest.approx(
        math.log2(257), rel=1e-6
    )
    assert masked_loss(model, one, one > 4, micro_batch_size=2) == pytest.approx(math.log(257))
    empty: list[Callable[[], float]] = [
        lambda: bits_per_byte(model, ids, 0 * lengths, micro_batch_size=2),
        lambda: masked_loss(model, ids, 0 * mask, micro_batch_size=2),
    ]
    assert [measure() for measure in empty] == [0.0, 0.0]


def test_window_warmup_reaches_the_model() -> None:
    model = random_model(sequence_len=256)
    config = dataclasses.replace(CONFIG, window_warmup=0.5)
    optimizer = ShardedOptimizer(model, config.optim)
    for step, share in ((0, 0.25), (2, 0.5), (4, 0.75), (5, 1.0)):
        train_step(model, optimizer, random_batch(0, False), step, config)
        assert model.window_share == share


@pytest.mark.parametrize(
    ("sequences", "micro_batch_size", "count"), [(4, 1, 4), (4, 2, 2), (3, 2, 2), (4, 4, 1)]
)
def test_reductions_start_in_the_last_micro_batch(
    sequences: int, micro_batch_size: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model()
    optimizer = ShardedOptimizer(model, CONFIG.optim)
    calls: list[str] = []
    compute_loss = model.loss

    def record_loss(*args: Any, **kwargs: Any) -> Tensor:
        calls.append("loss")
        return compute_loss(*args, **kwargs)

    monkeypatch.setattr(model, "loss", record_loss)
    monkeypatch.setattr(optimizer, "last_backward", lambda: calls.append("last"))
    config = dataclasses.replace(CONFIG, micro_batch_size=micro_batch_size)
    train_step(model, optimizer, Batch(random_batch(0, False).ids[:sequences]), 0, config)
    # Once more at the end, which starts what no backward pass has started.
    assert calls == ["loss"] * count + ["last", "last"]


def test_votes_come_back() -> None:
    model = random_model()
    optimizer = ShardedOptimizer(model, CONFIG.optim)
    result = train_step(
        model,
        optimizer,
        random_batch(0, False),
        0,
        CONFIG,
        votes=RankVotes(stop=True, writer_idle=True),
    )
    assert result.votes == (True, False, True, False)
    assert RankVotes() == (False, False, False, False)


def test_dropout_depends_on_seed_and_step() -> None:
    """Not on the generator's state, so that resumed and spread runs drop the same."""
    losses = {}
    for name, seed, step, noise in (
        ("one", 0, 3, 1), ("again", 0, 3, 2), ("step", 0, 4, 1), ("seed", 1, 3, 1)
    ):  # fmt: skip
        torch.manual_seed(noise)
        model = random_model(dropout=0.5)
        config = dataclasses.replace(CONFIG, seed=seed, micro_batch_size=2)
        optimizer = ShardedOptimizer(model, config.optim)
        losses[name] = train_step(model.train(), optimizer, random_batch(0, False), step, config)
        if name == "step":  # that of the last of two micro-batches
            seeds = np.random.SeedSequence((0, 4, 1))
            assert torch.initial_seed() == seeds.generate_state(1)[0]
    assert losses["one"] == losses["again"]
    assert len({result.loss for result in losses.values()}) == 3


def test_dropout_of_the_second_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two micro-batches of two sequences are the third and fourth of the global batch."""
    model = random_model(dropout=0.5)
    config = dataclasses.replace(CONFIG, seed=7, micro_batch_size=2)
    optimizer = ShardedOptimizer(model, config.optim)
    optimizer.rank = 1
    seeds: list[tuple[int, ...]] = []
    monkeypatch.setattr(step_module, "_seed_dropout", lambda *seed: seeds.append(seed))
    batch = Batch(np.zeros((4, 9), dtype=np.uint16))
    _accumulate(model, optimizer, batch, 5, config, CrossEntropy(), 64)
    assert seeds == [(7, 5, 2), (7, 5, 3)]


@pytest.mark.parametrize("sequences", [4, 5])
def test_one_rank_sums_rollouts_as_two_would(sequences: int) -> None:
    """In float32 (a + b) + (c + d) has other bits than ((a + b) + c) + d."""
    ids = np.concatenate([random_batch(seed, False).ids for seed in (0, 1)])[:sequences]
    model = random_model()
    optimizer = ShardedOptimizer(model, CONFIG.optim)

    def gradients(stage: Literal["base", "rl"], rows: np.ndarray) -> list[Tensor]:
        config = dataclasses.replace(CONFIG, stage=stage, micro_batch_size=1)
        _accumulate(model, optimizer, Batch(rows), 0, config, CrossEntropy(), 64)
        return [flat.grads.clone() for flat in optimizer.flats]

    cut = (sequences + 1) // 2  # the first rank's, if they cannot be shared equally
    halves = zip(gradients("base", ids[:cut]), gradients("base", ids[cut:]), strict=True)
    by_halves, in_order = [a + b for a, b in halves], gradients("base", ids)
    assert not all(map(torch.equal, by_halves, in_order))
    assert all(map(torch.equal, gradients("rl", ids), by_halves))
    torch.testing.assert_close(by_halves, in_order, rtol=1e-4, atol=1e-6)
