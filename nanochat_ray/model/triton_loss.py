"""Soft-capped cross-entropy of a block of logits, fused in one Triton kernel.

Per logit of 2 bytes the head's loss moves 12 bytes: the matmul writes it (2), the kernel reads it
twice and writes the gradient in its place (6), the two matmuls of the backward pass read that (4).
Eager torch makes ten passes in float32. The form is that of Liger's fused linear cross-entropy
(Hsu et al., arXiv 2410.10989); the online sum is Milakov and Gimelshein's (arXiv 1805.02867).
"""

# Triton resolves every name in a kernel's signature: it can have no annotations but its own.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096
"""Logits of one row that a program holds at a time."""
MAX_BOUND = 40.0
"""2^(-2 · 40 · log₂ e) is still a normal float32."""


@triton.jit
def _tanh(x, factor):
    """tanh(x · factor / (2 log₂ e)), to float32's eps around 1."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * factor))


@triton.jit
def _softcap_loss_kernel(
    logits_ptr,
    targets_ptr,
    loss_ptr,
    stride,
    vocab,
    cap,
    HAS_CAP: tl.constexpr,
    IS_BOUNDED: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss, and with HAS_GRAD d loss / d logits in place of the logits.

    Powers are of 2, which the GPU computes, and logits z in units of log 2 accordingly. With
    IS_BOUNDED no power of a logit less the cap underflows, so that no maximum is looked for.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    counts = target >= 0
    at_target = tl.load(logits_ptr + tl.maximum(target, 0)).to(tl.float32) * LOG2_E
    factor = 2 * LOG2_E / cap
    bound = cap * LOG2_E
    if HAS_CAP:
        at_target = bound * _tanh(at_target / LOG2_E, factor)
    offsets = tl.arange(0, BLOCK)
    top = tl.full((), float("-inf"), tl.float32)
    if IS_BOUNDED:
        top = bound
    total = tl.zeros((), tl.float32)
    for start in range(0, vocab, BLOCK):
        inside = start + offsets < vocab
        z = tl.load(logits_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
        if HAS_CAP:
            z = bound * _tanh(z, factor)
        else:
            z = z * LOG2_E
        z = tl.where(inside, z, float("-inf"))
        if IS_BOUNDED:
            total += tl.sum(tl.exp2(z - top), axis=0)
        else:
            new_top = tl.maximum(top, tl.max(z, axis=0))
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(z - new_top), axis=0)
            top = new_top
    log_sum = top + tl.log2(total)
    tl.store(loss_ptr + row, tl.where(counts, (log_sum - at_target) / LOG2_E, 0.0))
    if HAS_GRAD:
        for start in range(0, vocab, BLOCK):
            inside = start + offsets < vocab
            z = tl.load(logits_ptr + start + offsets, mask=inside, other=0.0).to(tl.float32)
            slope = 1.0
            if HAS_CAP:
                tanh_z = _tanh(z, factor)
                z = bound * tanh_z
                slope = 1.0 - tanh_z * tanh_z
            else:
                z = z * LOG2_E
            grad = tl.exp2(z - log_sum) - tl.where(start + offsets == target, 1.0, 0.0)
            grad = tl.where(counts, grad * slope, 0.0)
            tl.store(logits_ptr + start + offsets, grad.to(logits_ptr.dtype.element_ty), inside)


def softcap_loss_(logits: Tensor, targets: Tensor, *, cap: float, grad: bool) -> Tensor:
    """float32 ``[N]``: -log p of ``targets [N]`` (int64; 0 where it is -1), in nats.

    ``logits [N, V]`` (float32 or bfloat16, rows contiguous) are capped to cap·tanh(l / cap) if
    ``cap`` is not 0. With ``grad`` they are overwritten by d loss / d logits.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    assert targets.shape == (rows,)
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(vocab))
    if rows:
        _softcap_loss_kernel[(rows,)](
            logits,
            targets,
            loss,
            logits.stride(0),
            vocab,
            cap or 1.0,
            HAS_CAP=cap != 0,
            IS_BOUNDED=0 < cap <= MAX_BOUND,
            HAS_GRAD=grad,
            BLOCK=block,
            num_warps=max(4, block // 512),
        )
    return loss
