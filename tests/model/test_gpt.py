"""The forward pass against nanochat's, and against itself in other forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.fused import relu_squared, rms_norm
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.loss import softcap_cross_entropy, token_logprobs
from tests.tiny import tiny_config


def random_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> GPT:
    model, generator = GPT(config, dtype), torch.Generator().manual_seed(0)
    model.init_weights(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


# Recorded from nanochat itself (commit 92d63d4 of July 2026, float32) with the weights of
# ``by_formula`` and the ids below: eight logits of the last position of row 1, eight in the middle
# of row 0, and the mean square of all.
RECORDED: dict[tuple[str, int, int], tuple[list[float], list[float], float]] = {
    ("L", 4, 40): (
        [0.76355, -0.67694, -0.14547, 0.50256, 0.13876, 0.46959, -0.8381, 1.90154],
        [1.17336, -1.09436, 2.0994, -1.23265, 1.60105, -0.6149, -0.46144, 0.74245],
        0.558829,
    ),
    ("L", 2, 600): (  # longer than the context: attention slides over it
        [0.433006, 0.573782, -0.389107, 0.308426, -1.078909, 1.809168, -1.289902, -0.391342],
        [1.04953, -0.225417, 1.224381, -0.034956, 0.769985, 0.10013, -0.198994, 0.466837],
        0.440537,
    ),
    ("SSSL", 2, 200): (
        [0.56085, -0.03139, -0.38875, 0.52667, 0.03346, 0.88198, -1.21781, 0.81881],
        [-0.41013, 0.2719, -0.4813, 0.23082, -0.27148, 0.70924, -0.05428, -0.67444],
        0.440855,
    ),
}


def by_formula(model: GPT) -> None:
    with torch.no_grad():
        for number, (_, p) in enumerate(sorted(model.named_parameters())):
            n = torch.arange(p.numel(), dtype=torch.float64)
            value = 0.3 * torch.sin(0.7 * n + number) + 0.1 * torch.cos(1.3 * n * n % 7)
            p.copy_(value.view(p.shape).float())


@pytest.mark.parametrize(("pattern", "kv", "length"), list(RECORDED))
def test_modern_gives_nanochats_logits(pattern: str, kv: int, length: int) -> None:
    shape = {"vocab_size": 100, "n_layer": 4, "n_head": 4, "n_kv_head": kv, "n_embd": 32}
    model = GPT(ModelConfig.modern(**shape, sequence_len=256, window_pattern=pattern))
    by_formula(model)
    ids = (torch.arange(2 * length) ** 2 % 97).view(2, length)
    with torch.no_grad():
        logits = model(ids)
    last, middle, square = RECORDED[pattern, kv, length]
    assert logits[1, -1, :8].tolist() == pytest.approx(last, abs=2e-5)
    assert logits[0, length // 2, 90:98].tolist() == pytest.approx(middle, abs=2e-5)
    assert logits.double().square().mean().item() == pytest.approx(square, abs=2e-6)


def test_later_tokens_change_nothing() -> None:
    model = random_model(tiny_config())
    ids = torch.randint(0, 256, (1, 30), generator=torch.manual_seed(2))
    other = ids.clone()
    other[0, 20:] = (other[0, 20:] + 1) % 256
    with torch.no_grad():
        assert torch.equal(model(ids)[:, :20], model(other)[:, :20])


@pytest.mark.parametrize("cap", [0.0, 15.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_loss_equals_plain_loss(cap: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    monkey_rows, vocab = 70, 19000  # more than one chunk
    hidden = torch.randn(monkey_rows, 16).to(dtype).requires_grad_()
    weight = torch.randn(vocab + 5, 16, requires_grad=True)
    targets = torch.randint(0, vocab, (monkey_rows,))
    targets[::7] = -1
    targets[1] = 0
    ours = softcap_cross_entropy(hidden, weight, targets, cap=cap, vocab=vocab)
    (3 * ours).backward()
    grads = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    logits = F.linear(hidden, weight.to(dtype)).float()[:, :vocab]
    logits = cap * torch.tanh(logits / cap) if cap else logits
    plain = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    (3 * plain).backward()
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    if dtype == torch.bfloat16:
        near = {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)
    for result, reference in zip(grads, (hidden.grad, weight.grad), strict=True):
        torch.testing.assert_close(result, reference, **near)
    with torch.no_grad():
        assert softcap_cross_entropy(hidden, weight, targets, cap=cap, vocab=vocab) == ours


@pytest.mark.parametrize("cap", [0.0, 15.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_by_the_definition(cap: float, temperature: float) -> None:
    torch.manual_seed(0)
    vocab = 19000  # more than one chunk
    hidden = torch.randn(70, 16, requires_grad=True)
    weight = torch.randn(vocab + 5, 16, requires_grad=True)
    targets = torch.randint(0, vocab, (70,))
    targets[1] = 0
    factors = torch.randn(70)  # of either sign, as advantages are
    near: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}
    ours = token_logprobs(hidden, weight, targets, cap=cap, vocab=vocab, temperature=temperature)
    grads = torch.autograd.grad((factors * ours).sum(), (hidden, weight))
    logits = F.linear(hidden, weight)[:, :vocab]
    logits = cap * torch.tanh(logits / cap) if cap else logits
    plain = (logits / temperature).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    references = torch.autograd.grad((factors * plain).sum(), (hidden, weight))
    torch.testing.assert_close(ours, plain, **near)
    for result, reference in zip(grads, references, strict=True):
        torch.testing.assert_close(result, reference, **near)


@pytest.mark.parametrize("cap", [30.0, 100.0])
def test_large_caps_do_not_overflow(cap: float) -> None:
    hidden = torch.tensor([[1000.0], [-1000.0]], requires_grad=True)
    weight, targets = torch.tensor([[1.0], [0.0]]), torch.tensor([0, 0])
    # The logits are ±cap and 0: log p is 0, and -cap where the other token is all but certain.
    sums = softcap_cross_entropy(hidden, weight, targets, cap=cap, vocab=2)
    assert sums.item() == pytest.approx(cap)
    at = token_logprobs(hidden, weight, targets, cap=cap, vocab=2, temperature=0.2)
    assert at.tolist() == pytest.approx([0.0, -cap / 0.2])
    (sums + at.sum()).backward()
    assert torch.isfinite(hidden.grad).all()  # type: ignore[arg-type]


def test_a_head_without_gradient_gives_that_of_the_hidden() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(9, 8), torch.randn(20, 8)
    targets = torch.randint(0, 20, (9,))
    grads = []
    for needs_weight in (True, False):
        h = hidden.clone().requires_grad_()
        w = weight.clone().requires_grad_(needs_weight)
        softcap_cross_entropy(h, w, targets, cap=15.0, vocab=20).backward()
        assert (w.grad is not None) == needs_weight
        grads.append(h.grad)
    w = weight.clone().requires_grad_()
    softcap_cross_entropy(hidden, w, targets, cap=15.0, vocab=20).backward()
    assert grads[0] is not None
    assert torch.equal(grads[0], grads[1])
    assert w.grad is not None


def test_hand_written_gradients() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relu_squared, (x,))
    y = torch.randn(50, 24, requires_grad=True)
    result, reference = rms_norm(y, 1e-6), F.rms_norm(y, (24,), eps=1e-6)
    torch.testing.assert_close(result, reference)
    g = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(out, y, g)[0] for out in (result, reference))
    torch.testing.assert_close(ours, theirs)


def test_masked_targets_do_not_count() -> None:
    model = random_model(tiny_config())
    ids = torch.randint(0, 256, (3, 20), generator=torch.manual_seed(3))
    ids[0, 7] = 0  # the first token is one like others
    targets = ids.roll(-1, dims=1)
    targets[1] = -1
    each = model.loss(ids, targets, "none")
    assert torch.equal(each[1], torch.zeros(20))
    torch.testing.assert_close(model.loss(ids, targets, "sum"), each.sum())
    torch.testing.assert_close(model.loss(ids, targets), each.sum() / 40)
    assert model.loss(ids, torch.full_like(targets, -1)) == 0
    rows = (targets.flatten() >= 0).nonzero()[:, 0]
    torch.testing.assert_close(model.token_logprobs(ids, targets, rows), -each[targets >= 0])
    one = torch.full_like(targets, -1)
    one[2, 4] = targets[2, 4]
    torch.testing.assert_close(model.loss(ids, one), each[2, 4])


def test_bf16_is_near_fp32() -> None:
    config = tiny_config(n_layer=4)
    ids = torch.randint(0, 256, (2, 32), generator=torch.manual_seed(4))
    with torch.no_grad():
        one, two = random_model(config)(ids), random_model(config, torch.bfloat16)(ids)
    assert two.dtype == torch.float32
    assert (one - two).abs().mean() < 0.03 * one.std()
