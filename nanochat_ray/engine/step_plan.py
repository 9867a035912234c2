"""The forward of a CPU engine as one call in C (``csrc/step.c``) over a plan that is written once.

A call of one kernel through torch takes the host 5 to 15 µs, for itself and for the tensor of its
result, and a layer has ten. A plan lists the operations of ``InferenceModel.hidden`` and
``logits``, in their order, with the addresses of weights, buffers, keys and values, none of which
change. The kernels are the same, so the logits are bitwise equal.

Legend: N tokens, R of them with logits, C = n_embd, H heads, Hkv key/value heads, D head size.
"""

from __future__ import annotations

import ctypes
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.engine.linear import Linear
from nanochat_ray.engine.model import InferenceModel, Layer
from nanochat_ray.engine.native import PANEL_WIDTH, Native
from nanochat_ray.engine.plan_operations import (
    WEIGHT_FORMATS,
    Index,
    Kind,
    Operation,
    Step,
    operation,
)
from nanochat_ray.model.config import COMMON_OPTIONS

OPTIONS = COMMON_OPTIONS
"""Fields of ``ModelConfig`` that a plan computes; with others ``InferenceModel.hidden`` is used."""


class SlotMemory(Protocol):
    """What a plan needs of ``kvcache.slot_cache.SlotCache``."""

    keys: Tensor
    """float32 or bfloat16 ``[layers, slots, Hkv, length, D]``, at an address that stays"""
    values: Tensor
    slots_and_positions: Tensor
    """int64 ``[2, N]``, of the step"""
    tile_starts: Tensor
    """As ``Native.attention`` takes them."""


class PlanWriter:
    """Operations over buffers of ``capacity`` rows. Buffers with the same name and width are the
    same, so that they stay in a processor's cache."""

    def __init__(self, native: Native, capacity: int):
        self.operations: list[Operation] = []
        self.scratch_size = 0
        """Bytes, for each thread."""
        self.capacity = capacity
        self._native = native
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def buffer(self, name: str, width: int) -> Tensor:
        """float32 ``[capacity, width]``"""
        key = (name, width)
        if key not in self._buffers:
            self._buffers[key] = torch.zeros((self.capacity, width))
        return self._buffers[key]

    def add_operation(self, kind: Kind, y: Tensor | None, x: Tensor, **fields: Any) -> None:
        """Appends ``plan_operations.operation`` of these arguments."""
        self.operations.append(operation(kind, y, x, **fields))

    def linear(self, layer: Linear, x: Tensor, name: str) -> Tensor:
        """The buffer with the result, ``[capacity, N rounded up to PANEL_WIDTH]``."""
        if x.stride(0) != layer.in_features:  # the kernel reads contiguous rows
            whole, x = x, self.buffer("slice", layer.in_features)
            self.add_operation(Kind.SCALE, x, whole)
        panels = layer.weight.size(0)
        y = self.buffer(name, panels * PANEL_WIDTH)
        self._add_linear(layer, x, y)
        return y

    def logits(self, layer: Linear, x: Tensor) -> None:
        self._add_linear(layer, x, None)

    def _add_linear(self, layer: Linear, x: Tensor, y: Tensor | None) -> None:
        weight, width = layer.weight, layer.in_features
        size = self._native.scratch_size(self.capacity, width, weight.dtype)
        self.scratch_size = max(self.scratch_size, size)
        self.add_operation(
            Kind.LINEAR,
            y,
            x,
            weight=weight,
            width=width,
            weight_format=WEIGHT_FORMATS[weight.dtype],
            count=weight.size(0),
        )


class StepPlan:
    """Computes the logits of a step whose tokens ``cache`` has been prepared for."""

    def __init__(self, model: InferenceModel, cache: SlotMemory, native: Native):
        self._model, self._cache, self._native = model, cache, native
        self._step = Step(
            document_start=model.config.document_start,
            kv_length=cache.keys.size(3),
            attention_scale=native.attention_scale,
        )
        self._scratch = torch.empty(0, dtype=torch.uint8)
        self._write(1)

    def _write(self, capacity: int) -> None:
        self._writer = PlanWriter(self._native, capacity)
        _write_forward(self._writer, self._model, self._cache)
        operations = self._writer.operations
        self._operations = (Operation * len(operations))(*operations)

    def run(self, tokens: np.ndarray, logits_indices: list[int]) -> Tensor:
        """float32 ``[R, V]``, the logits of those tokens, of int64 ``tokens [2, N]``: their ids,
        and the ids before them."""
        N, R = tokens.shape[1], len(logits_indices)
        if self._writer.capacity < N:
            self._write(max(N, 2 * self._writer.capacity))
        config, step, threads = self._model.config, self._step, torch.get_num_threads()
        if self._scratch.numel() < threads * self._writer.scratch_size:
            self._scratch = torch.empty(threads * self._writer.scratch_size, dtype=torch.uint8)
        rows = np.array(logits_indices, dtype=np.int64)
        slots, positions = self._cache.slots_and_positions
        tile_starts = self._cache.tile_starts
        panels = self._model.linears["lm_head"].weight.size(0)
        logits = torch.empty((R, panels * PANEL_WIDTH))
        step.indices[:] = (
            *(tokens[0].ctypes.data, tokens[1].ctypes.data),
            *(positions.data_ptr(), rows.ctypes.data),
        )
        step.slots, step.tile_starts = slots.data_ptr(), tile_starts.data_ptr()
        step.rows, step.num_logits, step.tiles = N, R, tile_starts.size(0) - 1
        step.logits, step.scratch = logits.data_ptr(), self._scratch.data_ptr()
        step.threads = threads
        self._native.run_step(self._operations, len(self._operations), ctypes.addressof(step))
        return logits[:, : config.vocab_size]


def _write_forward(plan: PlanWriter, model: InferenceModel, cache: SlotMemory) -> None:
    """``InferenceModel.hidden`` and ``logits``, operation by operation."""
    c, op = model.config, plan.add_operation
    x, term = plan.buffer("x", c.n_embd), plan.buffer("term", c.n_embd)
    hidden = plan.buffer("hidden", c.n_embd)
    cos, sin = (plan.buffer(name, c.head_dim // 2) for name in ("cos", "sin"))
    op(Kind.GATHER, cos, model.cos, extra=Index.POSITIONS)
    op(Kind.GATHER, sin, model.sin, extra=Index.POSITIONS)
    _write_embedding(plan, model, x, term)
    x0 = plan.buffer("x0", c.n_embd)
    pairs = c.n_layer // 2 if c.skips else 0
    if c.residual_scalars or pairs:
        op(Kind.SCALE, x0, x)
    middle = plan.buffer("middle", c.n_embd)
    skip_outputs: list[Tensor] = []
    for i, layer in enumerate(model.layers):
        if c.residual_scalars:
            op(Kind.SCALE, term, x0, factor=model.tensors["x0_lambdas"][i])
            op(Kind.SCALE, x, x, factor=model.tensors["resid_lambdas"][i])
            op(Kind.ADD, x, term)
        if pairs and i >= c.n_layer - pairs:
            pair = c.n_layer - 1 - i
            gates = _write_gates(plan, model.linears[f"skip_gates.{pair}"], x0)
            strength = model.tensors["skip_lambdas"][pair]
            op(Kind.GATE, term, skip_outputs.pop(), weight=gates, factor=strength, count=1)
            op(Kind.ADD, x, term)
        op(Kind.RMS_NORM, hidden, x, value=c.norm_eps)
        op(Kind.ADD, x, _write_attention(plan, model, layer, i, hidden, cache))
        op(Kind.RMS_NORM, hidden, x, value=c.norm_eps)
        inner = plan.linear(layer.mlp_input, hidden, "inner")
        op(Kind.RELU_SQUARED, inner, inner)
        op(Kind.ADD, x, plan.linear(layer.mlp_output, inner, "output"))
        if i < pairs:
            skip_outputs.append(plan.buffer(f"skip {i}", c.n_embd))
            op(Kind.SCALE, skip_outputs[-1], x)
        if c.backout and i == c.n_layer // 2:
            op(Kind.SCALE, middle, x)
    if c.backout:
        op(Kind.SCALE, term, middle, factor=model.tensors["backout_lambda"], value=-1.0)
        op(Kind.ADD, x, term)
    op(Kind.RMS_NORM, hidden, x, value=c.norm_eps)
    op(Kind.GATHER, term, hidden, extra=Index.LOGITS)
    plan.logits(model.linears["lm_head"], term)
    if c.softcap:
        width = model.linears["lm_head"].weight.size(0) * PANEL_WIDTH
        op(Kind.SOFTCAP, None, term, width=width, value=c.softcap)


def _write_gates(plan: PlanWriter, layer: Linear, x: Tensor) -> Tensor:
    """Gates before their sigmoid, from the first inputs of x."""
    return plan.linear(layer, x[:, : layer.in_features], "gates")


def _write_embedding(plan: PlanWriter, model: InferenceModel, x: Tensor, term: Tensor) -> None:
    c, op, table = model.config, plan.add_operation, model.tensors["transformer.wte.weight"]
    op(Kind.GATHER, term, table, extra=Index.IDS)
    op(Kind.RMS_NORM, x, term, value=c.norm_eps)
    if c.smear:
        before = plan.buffer("before", c.n_embd)
        op(Kind.GATHER, term, table, extra=Index.PREVIOUS)
        op(Kind.RMS_NORM, before, term, value=c.norm_eps)
        gates = _write_gates(plan, model.linears["smear_gate"], x)
        strength = model.tensors["smear_lambda"]
        op(Kind.GATE, before, before, weight=gates, factor=strength, count=1, extra=1)
        op(Kind.ADD, x, before)


def _write_attention(
    plan: PlanWriter, model: InferenceModel, layer: Layer, i: int, x: Tensor, cache: SlotMemory
) -> Tensor:
    c, op = model.config, plan.add_operation
    H, Hkv, D = c.n_head, c.n_kv_head, c.head_dim
    qkv = plan.linear(layer.qkv, x, "qkv")
    cos, sin = (plan.buffer(name, D // 2) for name in ("cos", "sin"))
    op(Kind.ROTARY, qkv, cos, weight=sin, count=H + Hkv, value=c.norm_eps)
    q, v = qkv[:, : H * D], qkv[:, (H + Hkv) * D : (H + 2 * Hkv) * D]
    if layer.value_gate is not None and layer.value_embedding is not None:
        embeddings = plan.buffer("value embeddings", Hkv * D)
        op(Kind.GATHER, embeddings, layer.value_embedding, extra=Index.IDS)
        gates = _write_gates(plan, layer.value_gate, x)
        op(Kind.GATE, embeddings, embeddings, weight=gates, width=D, count=Hkv, value=3.0)
        op(Kind.ADD, v, embeddings)
    if model.q_scale != 1:
        op(Kind.SCALE, q, q, value=model.q_scale)
    y = plan.buffer("attention", H * D)
    keys, values = cache.keys[i], cache.values[i]
    window = layer.window
    op(Kind.ATTENTION, y, qkv, weight=keys, factor=values, count=Hkv, width=H * D, extra=window)
    if layer.head_gate is not None:
        gates = _write_gates(plan, layer.head_gate, x)
        op(Kind.GATE, y, y, weight=gates, width=D, count=H)
    return plan.linear(layer.attention_output, y, "output")
