"""The fused loss kernel against float64, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from nanochat_ray.model import loss as loss_module

pytest.importorskip("triton")
from nanochat_ray.model import triton_loss
from nanochat_ray.model.triton_loss import softcap_loss_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cap", [15.0, 60.0, 0.0])
@pytest.mark.parametrize(("rows", "vocab", "stride"), [(5, 37, 64), (3, 5000, 5000), (1, 1, 1)])
def test_fused_loss_equals_float64(
    rows: int, vocab: int, stride: int, cap: float, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(rows)
    table = (torch.randn(rows, stride, generator=generator) * 20).to(dtype)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    if rows > 1:
        targets[1] = -1
    exact = table[:, :vocab].double().requires_grad_()
    capped_logits = cap * torch.tanh(exact / cap) if cap else exact
    loss = F.cross_entropy(capped_logits, targets, ignore_index=-1, reduction="none")
    loss.sum().backward()
    on_device = table.to(DEVICE, copy=True)
    logits = on_device[:, :vocab]
    result = softcap_loss_(logits, targets.to(DEVICE), cap=cap, grad=True)
    # Sums of up to V terms of float32, each with a few roundings; |z| up to 100 before exp.
    eps = torch.finfo(torch.float32).eps
    largest = float(capped_logits.detach().abs().max())
    bound = 8 * eps * max(1.0, largest)
    assert (result.cpu().double() - loss.detach()).abs().max() <= bound * 4
    rounding = torch.finfo(dtype).eps if dtype is torch.bfloat16 else 0.0
    assert exact.grad is not None
    error = (logits.cpu().double() - exact.grad).abs()
    assert (error <= bound * 4 + rounding * exact.grad.abs()).all()
    assert torch.equal(on_device[:, vocab:].cpu(), table[:, vocab:])  # padding stays


def test_fused_loss_without_gradient_reads_only() -> None:
    logits = torch.randn(4, 33, device=DEVICE)
    before = logits.clone()
    targets = torch.tensor([0, 32, -1, 5], device=DEVICE)
    loss = softcap_loss_(logits, targets, cap=15.0, grad=False)
    assert torch.equal(logits, before)
    assert loss[2] == 0
    again = softcap_loss_(logits, targets, cap=15.0, grad=True)
    # Compilers contract the last subtraction of numbers up to 15 / log 2 in one of the two.
    assert (loss - again).abs().max() <= 2 * torch.finfo(torch.float32).eps * 15 / math.log(2)


@pytest.mark.parametrize("cap", [15.0, 0.0])
def test_fused_head_equals_the_torch_one(cap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    activations = torch.randn(40, 16, generator=generator).to(DEVICE)
    weight = torch.randn(64, 16, generator=generator).to(DEVICE)
    targets = torch.randint(-1, 50, (40,), generator=generator).to(DEVICE)
    results = []
    for use_kernel in (False, True):
        monkeypatch.setattr(
            loss_module, "use_triton", lambda device, use_kernel=use_kernel: use_kernel
        )
        h, w = activations.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = loss_module.softcap_cross_entropy(h, w, targets, cap=cap, vocab=50)
        each = loss_module.token_logprobs(
            h, w, targets.clamp_min(0), cap=cap, vocab=50, temperature=0.7
        )
        (loss * 0.5 - each[::3].sum()).backward()
        results.append((loss.detach(), each.detach(), h.grad, w.grad))
    for eager, kernel in zip(*results, strict=True):
        assert eager is not None
        assert kernel is not None
        # Sums of at most 50 terms in another order.
        torch.testing.assert_close(kernel, eager, rtol=50 * 1.2e-7, atol=50 * 1.2e-7 * 10)


class Traffic(TorchDispatchMode):
    """Sums the bytes of tensors with a number for each logit that torch's operations read or
    write."""

    def __init__(self, num_logits: int):
        super().__init__()
        self.num_logits, self.num_bytes = num_logits, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            leaves = torch.utils._pytree.tree_leaves((args, kwargs, result))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            self.num_bytes += sum(t.nbytes for t in tensors if t.numel() == self.num_logits)
        return result


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter counts what a kernel loads")
def test_loss_moves_12_bytes_a_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, forward and backward: 6 in its three matmuls, 6 in its kernel."""
    from triton.runtime.interpreter import interpreter_builder as builder

    num_elements = 0

    def count(name: str, mask_index: int) -> None:
        real = getattr(builder, name)

        def counting(*args: Any) -> Any:
            nonlocal num_elements
            num_elements += int(args[mask_index].data.sum())
            return real(*args)

        monkeypatch.setattr(builder, name, counting)

    def kernel(*args: Any, **rest: Any) -> torch.Tensor:
        with _disable_current_modes():  # the interpreter's own copies
            return softcap_loss_(*args, **rest)

    monkeypatch.setattr(triton_loss, "softcap_loss_", kernel)
    count("create_masked_load", 1)
    count("create_masked_store", 2)
    monkeypatch.setattr(loss_module, "use_triton", lambda device: True)
    N, V, C = 16, 96, 8
    hidden = torch.randn(N, C).bfloat16().requires_grad_()
    weight = torch.randn(V, C).requires_grad_()
    with Traffic(N * V) as traffic:
        loss = loss_module.softcap_cross_entropy(hidden, weight, torch.arange(N), cap=15.0, vocab=V)
        loss.backward()
    # Two reads and a write of each logit; of each row the target, its logit and the loss.
    assert 3 * N * V <= num_elements <= 3 * N * V + 3 * N
    assert traffic.num_bytes / (N * V) + 3 * 2 == 12
