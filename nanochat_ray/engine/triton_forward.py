"""The forward of an inference model over a paged cache, in fused Triton kernels.

The same function as ``model.InferenceModel.hidden``, which tests compare it with; it rounds to the
activations' dtype less often, since sums stay in float32 within a kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from nanochat_ray.engine import triton_fused
from nanochat_ray.engine.kvcache.kv_cache import KVTarget
from nanochat_ray.engine.linear import Linear
from nanochat_ray.engine.triton_fused import Gate
from nanochat_ray.engine.triton_operators import TritonOperators
from nanochat_ray.model.config import COMMON_OPTIONS, ModelConfig

if TYPE_CHECKING:
    from nanochat_ray.engine.model import Layer

OPTIONS = COMMON_OPTIONS
"""Fields of ``ModelConfig`` that this computes; with others ``InferenceModel.hidden`` is used."""


class PagedKeys(Protocol):
    """A cache whose pages a kernel may write to (``kvcache.paged_cache.PagedCache``)."""

    positions: Tensor
    """int64 ``[N]``"""

    def kv_target(self, layer: int) -> KVTarget:
        """Where the keys and values of the step go."""
        ...

    def attend_pages(self, layer: int, q: Tensor, window: int) -> Tensor:
        """Attention of ``q [N, H, D]`` once keys and values are written."""
        ...


class TritonForward:
    """Over the weights of a model, which are read where they are."""

    def __init__(
        self,
        config: ModelConfig,
        layers: Sequence[Layer],
        linears: Mapping[str, Linear],
        tensors: Mapping[str, Tensor],
        rotary: tuple[Tensor, Tensor],
        q_scale: float,
        dtype: torch.dtype,
    ):
        """``linears`` and ``tensors`` by their names in a state dict; ``rotary``: cos and sin
        ``[positions, D / 2]``."""
        self._config, self._layers, self._tensors = config, layers, tensors
        self._rotary, self._q_scale, self._dtype = rotary, q_scale, dtype
        self._operators = TritonOperators()
        self._num_skips = config.n_layer // 2 if config.skips else 0
        self._skip_gates = [
            _gate(linears[f"skip_gates.{i}"], tensors["skip_lambdas"], i)
            for i in range(self._num_skips)
        ]
        self._sources = set(range(self._num_skips))
        """Blocks whose output a later one reads."""
        if config.backout:
            self._sources.add(config.n_layer // 2)
        self._smear = (
            _gate(linears["smear_gate"], tensors["smear_lambda"]) if config.smear else None
        )

    def hidden(self, ids: Tensor, previous: Tensor, cache: PagedKeys) -> Tensor:
        """As ``InferenceModel.hidden``."""
        config, eps = self._config, self._config.norm_eps
        table = self._tensors["transformer.wte.weight"]
        start = config.document_start
        x0 = triton_fused.embed(ids, previous, table, self._smear, start, self._dtype, eps)
        x, y = x0, None
        outputs: dict[int, Tensor] = {}
        """Of the blocks that a later one reads."""
        for i, layer in enumerate(self._layers):
            skip = self._skip(i, outputs)
            x, norm, total = triton_fused.residual_norm(
                *(x, y, eps),
                x0=x0,
                scales=self._scales(i),
                skip=skip,
                keeps=i - 1 in self._sources,
            )
            outputs[i - 1] = total
            y = self._attention(i, layer, norm, ids, cache)
            x, norm, _ = triton_fused.residual_norm(x, y, eps)
            y = layer.mlp_output(self._operators.relu_squared(layer.mlp_input(norm)))
        backout = None
        if config.backout:
            backout = outputs.get(config.n_layer // 2), self._tensors["backout_lambda"]
        return triton_fused.residual_norm(x, y, eps, backout=backout)[1]

    def _scales(self, i: int) -> tuple[Tensor, Tensor, int] | None:
        if not self._config.residual_scalars:
            return None
        return self._tensors["resid_lambdas"], self._tensors["x0_lambdas"], i

    def _skip(self, i: int, outputs: Mapping[int, Tensor]) -> tuple[Tensor | None, Gate] | None:
        """The output of an earlier block that block i adds; None of the one before it, which is
        only being computed."""
        source = self._config.n_layer - 1 - i
        if i < self._config.n_layer - self._num_skips:
            return None
        return (None if source == i - 1 else outputs[source]), self._skip_gates[source]

    def _attention(self, i: int, layer: Layer, x: Tensor, ids: Tensor, cache: PagedKeys) -> Tensor:
        config, values = self._config, None
        if layer.value_gate is not None and layer.value_embedding is not None:
            gate = layer.value_gate
            values = ids, x, gate.weight, gate.in_features, layer.value_embedding
        q = triton_fused.rotate_and_store(
            layer.qkv(x),
            cache.positions,
            self._rotary,
            cache.kv_target(i),
            config.n_head,
            self._q_scale,
            config.norm_eps,
            values,
        )
        y = cache.attend_pages(i, q, layer.window)
        if layer.head_gate is not None:
            gate_NH = torch.sigmoid(layer.head_gate(x[:, : layer.head_gate.in_features]))
            y = y * gate_NH.unsqueeze(-1)
        return layer.attention_output(y.reshape(x.size(0), -1))


def _gate(linear: Linear, factor: Tensor, index: int = 0) -> Gate:
    return Gate(linear.weight, linear.in_features, factor, index)
