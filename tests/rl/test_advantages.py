"""Advantages, weights and objectives against hand-computed values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from nanochat_ray.model.gpt import GPT
from nanochat_ray.rl.config import RLConfig
from nanochat_ray.rl.losses import KINDS, PolicyLoss, kl_estimate, surrogate
from nanochat_ray.train.ranks import Ranks
from nanochat_ray.train.step import MicroBatch
from tests.tiny import tiny_config

REWARDS = np.array([1.0, 0.0, 0.0, 1.0, 0.0])  # mean 0.4


def test_baseline_is_the_groups_mean() -> None:
    assert KINDS["reinforce"].advantages(REWARDS) == pytest.approx([0.6, -0.4, -0.4, 0.6, -0.4])


def test_rloo_leaves_the_answer_out() -> None:
    # Others of a right answer: 1 of 4 right; of a wrong one: 2 of 4.
    assert KINDS["rloo"].advantages(REWARDS) == pytest.approx([0.75, -0.5, -0.5, 0.75, -0.5])


def test_grpo_divides_by_the_deviation() -> None:
    # Variance with n - 1 = 4 degrees of freedom: (2·0.36 + 3·0.16) / 4 = 0.3.
    std = math.sqrt(0.3)
    reference = [0.6 / std, -0.4 / std, -0.4 / std, 0.6 / std, -0.4 / std]
    assert KINDS["grpo"].advantages(REWARDS) == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize(
    ("loss", "first_weight", "divisor"),
    [
        ("reinforce", 1.0, 7.0),  # tokens of all answers
        ("dapo", 1.0, 7.0),
        ("cispo", 1.0, 7.0),
        ("grpo", 0.5, 3.0),  # 1 / length, then a mean over three answers
        ("gspo", 0.5, 3.0),
        ("rloo", 1.0, 3.0),
        ("dr_grpo", 1.0, 30.0),  # three answers of at most ten tokens
    ],
)
def test_aggregation(loss: str, first_weight: float, divisor: float) -> None:
    kind = KINDS[loss]  # type: ignore[index]
    assert kind.sequence_weight(2) == first_weight
    assert kind.denominator(np.array([2, 4, 1]), 10) == divisor


# Two tokens of sequence 0 with ratios 1.5 and 0.5, one token of sequence 1 with ratio 2.
RATIOS = [1.5, 0.5, 2.0]
SAMPLED = torch.tensor([-1.0, -2.0, -0.5])
SEQUENCES = torch.tensor([0, 0, 1])


def gains(loss: str, advantage: float, stale: int = 0) -> tuple[list[float], list[float]]:
    """Surrogates of the three tokens, and their gradients by the log-probabilities."""
    logprobs = (SAMPLED + torch.tensor(RATIOS).log()).requires_grad_()
    config = RLConfig(loss=loss, stale=stale, clip_low=0.2, clip_high=0.3)  # type: ignore[arg-type]
    gain = surrogate(config, logprobs, SAMPLED, torch.full((3,), advantage), SEQUENCES, 2)
    (grad,) = torch.autograd.grad(gain.sum(), logprobs)
    return gain.tolist(), grad.tolist()


def test_reinforce_is_advantage_times_logprob() -> None:
    gain, grad = gains("reinforce", 2.0)
    logprobs = [-1 + math.log(1.5), -2 + math.log(0.5), -0.5 + math.log(2)]
    assert gain == pytest.approx([2 * x for x in logprobs])
    assert grad == [2.0, 2.0, 2.0]


def test_clipping_is_pessimistic() -> None:
    # Positive advantage: capped at 1.3, where there is no gradient; below 0.8 it is not raised.
    gain, grad = gains("grpo", 2.0)
    assert gain == pytest.approx([2.6, 1.0, 2.6])
    assert grad == pytest.approx([0.0, 1.0, 0.0])
    # Negative: at least 0.8; above 1.3 it is not lowered.
    gain, grad = gains("dapo", -1.0)
    assert gain == pytest.approx([-1.5, -0.8, -2.0])
    assert grad == pytest.approx([-1.5, 0.0, -2.0])


def test_gspo_has_one_ratio_per_sequence() -> None:
    # exp of the mean log-ratio: sqrt(1.5 · 0.5) = 0.866; sequence 1 is capped at 1.3.
    ratio = math.sqrt(0.75)
    gain, grad = gains("gspo", 2.0)
    assert gain == pytest.approx([2 * ratio, 2 * ratio, 2.6])
    # Each of both tokens has half of the log-ratio, and both surrogates depend on it.
    assert grad == pytest.approx([2 * ratio, 2 * ratio, 0.0])


def test_cispo_keeps_the_gradient_of_clipped_tokens() -> None:
    _, grad = gains("cispo", 2.0)
    assert grad == pytest.approx([2 * 1.3, 2 * 0.8, 2 * 1.3])


def test_stale_answers_have_the_exact_ratio() -> None:
    # No ratio is clipped; gain = gradient = advantage · ratio.
    gain, grad = gains("reinforce", 2.0, stale=1)
    assert gain == pytest.approx([3.0, 1.0, 4.0])
    assert grad == pytest.approx([3.0, 1.0, 4.0])


def test_kl_estimate() -> None:
    # d = ln 2: 2 - ln 2 - 1; equal distributions: 0.
    logprobs = torch.tensor([-2.0, -1.0])
    reference = torch.tensor([-2.0 + math.log(2), -1.0])
    assert kl_estimate(logprobs, reference).tolist() == pytest.approx([1 - math.log(2), 0.0])


def micro_batch(advantage: float) -> MicroBatch:
    inputs, targets = torch.tensor([[1, 2, 3]]), torch.tensor([[-1, 3, 0]])
    values = {"weights": 3.0, "advantages": advantage, "logprobs": -5.0, "rehearsal": 0.0}
    token_inputs = {name: torch.full((2,), value) for name, value in values.items()}
    return MicroBatch(inputs, targets, torch.tensor([1, 2]), token_inputs)


def random_model(seed: int) -> GPT:
    model = GPT(tiny_config())
    model.init_weights(torch.Generator().manual_seed(seed))
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_loss_by_the_definition(temperature: float) -> None:
    model, reference = random_model(0), random_model(1)
    config = RLConfig(kl=0.5, temperature=temperature)
    objective = PolicyLoss(config, Ranks(), max_diff=0, reference=reference)
    micro = micro_batch(2.0)
    loss = objective.loss(model, micro).item()
    terms, diffs, divergences = [], [], []
    for position, target in ((1, 3), (2, 0)):
        own, other = (
            (m(micro.inputs) / temperature).log_softmax(-1)[0, position, target].item()
            for m in (model, reference)
        )
        divergence = math.exp(other - own) - (other - own) - 1
        terms.append(3.0 * (0.5 * divergence - 2.0 * own))
        diffs.append(abs(own + 5.0))
        divergences.append(divergence)
    assert loss == pytest.approx(sum(terms), rel=1e-4)
    figures = objective.finish()
    assert figures["logprob_diff"] == pytest.approx(max(diffs), rel=1e-4)
    assert figures["kl"] == pytest.approx(sum(divergences) / 2, rel=1e-3)
    assert objective.finish() == {"logprob_diff": 0.0, "kl": 0.0}  # of the next step


def test_a_sequences_ratio_is_of_its_own_tokens() -> None:
    model = random_model(0)
    inputs = torch.tensor([[1, 2, 3], [4, 5, 6]])
    targets = torch.tensor([[-1, 3, 0], [5, 6, 7]])
    logprobs = model(inputs).log_softmax(-1).gather(2, targets.clamp_min(0)[..., None])[..., 0]
    # Samplers under which the ratios of tokens are 1, 1.21 and 0.9, 1, 1.
    ratios = torch.tensor([[1.0, 1.0, 1.21], [0.9, 1.0, 1.0]])
    token_inputs = {
        "weights": torch.ones(5),
        "advantages": torch.tensor([2.0] * 2 + [1.0] * 3),
        "logprobs": (logprobs - ratios.log()).detach().flatten()[1:],
        "rehearsal": torch.zeros(5),
    }
    rows = torch.arange(1, 6)
    objective = PolicyLoss(RLConfig(loss="gspo"), Ranks(), max_diff=0)
    loss = objective.loss(model, MicroBatch(inputs, targets, rows, token_inputs)).item()
    assert loss == pytest.approx(-(2 * 2 * 1.1 + 3 * 0.9 ** (1 / 3)), rel=1e-4)


def test_difference_above_the_bound_raises() -> None:
    lenient = PolicyLoss(RLConfig(), Ranks(), max_diff=0)
    lenient.loss(random_model(0), micro_batch(1.0))
    diff = lenient.finish()["logprob_diff"]
    exact = PolicyLoss(RLConfig(), Ranks(), max_diff=diff)
    exact.loss(random_model(0), micro_batch(1.0))
    assert exact.finish() == {"logprob_diff": diff}
    objective = PolicyLoss(RLConfig(), Ranks(), max_diff=1e-4)
    objective.loss(random_model(0), micro_batch(1.0))
    with pytest.raises(FloatingPointError, match=r"more than max_logprob_diff=0\.0001"):
        objective.finish()
