"""Cross-entropy of soft-capped logits that never holds all logits at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat_ray.machine import use_triton

CHUNK = 1 << 20
"""Logits that exist at one time on a CPU: 4 MB in float32 (measured: the best of 2^17 to 2^22)."""
MAX_UNSHIFTED = 60.0
"""Logits to here need no shift by the largest: e^60 times 2^40 tokens is no overflow yet."""


def _softcap_loss(
    logits: Tensor, targets: Tensor, cap: float, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Loss ``[N]`` and, with ``needs_grad``, d loss / d logits.

    ``logits`` are float32 and are overwritten.
    """
    counts = targets >= 0
    index = targets.clamp_min(0)[:, None]
    tanh = logits.div_(cap).tanh_() if cap else None
    z = logits if tanh is None else tanh * cap
    if not 0 < cap <= MAX_UNSHIFTED:
        z.sub_(z.amax(dim=-1, keepdim=True))
    at_target = z.gather(1, index)[:, 0]
    grad = z.exp_()
    sums = grad.sum(dim=-1, keepdim=True)
    loss = (sums.log()[:, 0] - at_target).masked_fill_(~counts, 0.0)
    if needs_grad:
        grad.mul_(counts[:, None] / sums)
        grad.scatter_add_(1, index, -counts[:, None].to(grad.dtype))
        if tanh is not None:
            grad.addcmul_(grad, tanh.square_(), value=-1)
    return loss, grad


class _SoftcapCrossEntropy(torch.autograd.Function):
    """Sum of nats; the gradients are made chunk by chunk while the logits are at hand.

    With z = cap·tanh(l / cap): dL/dl = (softmax(z) - onehot) · (1 - tanh²(l / cap)).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, cap: float, vocab: int
    ) -> Tensor:
        needs_grad = hidden.requires_grad or weight.requires_grad
        w = weight[:vocab].to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for part, loss, grad in _token_losses(hidden, w, targets, cap, grad=needs_grad):
            total += loss.sum()
            if grad_hidden is None or grad_weight is None:
                continue
            grad = grad.to(hidden.dtype)
            torch.matmul(grad, w, out=grad_hidden[part])
            grad_weight[:vocab] += grad.T @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grads[0]
        weight = (grad_weight * scale).to(ctx.weight_dtype)
        return grad_hidden * scale.to(grad_hidden.dtype), weight, None, None, None


class _TokenLogprobs(torch.autograd.Function):
    """Log-probability of each target. The backward pass computes the logits again, chunk by chunk,
    since only then is the factor of each token's gradient known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        cap: float,
        vocab: int,
        temperature: float,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.constants = cap, vocab, temperature
        w = weight[:vocab].to(hidden.dtype)
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        for part, loss, _ in _token_losses(hidden, w, targets, cap, temperature, grad=False):
            logprobs[part] = -loss
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        cap, vocab, temperature = ctx.constants
        w = weight[:vocab].to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        factors = grads[0] * (-1 / temperature)
        for part, _, grad in _token_losses(hidden, w, targets, cap, temperature, grad=True):
            grad = (grad * factors[part, None]).to(hidden.dtype)
            torch.matmul(grad, w, out=grad_hidden[part])
            grad_weight[:vocab] += grad.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _token_losses(
    hidden: Tensor,
    w: Tensor,
    targets: Tensor,
    cap: float,
    temperature: float = 1.0,
    *,
    grad: bool,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their loss ``[n]``, d loss / d (logits / temperature) ``[n, vocab]``) by chunks."""
    size = max(16, CHUNK // len(w)) if hidden.device.type == "cpu" else 1 << 13
    uses_triton = use_triton(hidden.device)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        logits = F.linear(hidden[part], w)
        if temperature != 1:  # cap·tanh(l / cap) / T = (cap / T)·tanh((l / T) / (cap / T))
            logits = logits.float().div_(temperature)
        if uses_triton:
            from nanochat_ray.model.triton_loss import softcap_loss_

            loss = softcap_loss_(logits, targets[part], cap=cap / temperature, grad=grad)
            yield part, loss, logits
        else:
            yield part, *_softcap_loss(logits.float(), targets[part], cap / temperature, grad)


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    cap: float,
    vocab: int,
    temperature: float,
) -> Tensor:
    """Log-probabilities, float32 ``[N]``, of ``targets [N]`` int64 (all from 0) at a temperature.

    The other arguments are those of ``softcap_cross_entropy``.
    """
    return _TokenLogprobs.apply(hidden, weight, targets, cap, vocab, temperature)


def softcap(logits: Tensor, cap: float) -> Tensor:
    """``cap`` tanh(logits / ``cap``), as in Gemma 2; 0 leaves logits as they are."""
    return cap * torch.tanh(logits / cap) if cap else logits


def softcap_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, cap: float, vocab: int
) -> Tensor:
    """Sum over ``targets [N]`` (int64, -1 is left out) of -log p in nats, a float32 scalar.

    ``hidden`` is ``[N, C]`` in the compute dtype, ``weight`` the head's ``[padded vocab, C]``, of
    which the first ``vocab`` rows count. ``cap`` 0 leaves the logits as they are.
    """
    return _SoftcapCrossEntropy.apply(hidden, weight, targets, cap, vocab)
