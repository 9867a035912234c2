"""The inference model: built from a state dict, with flat tokens and the KV cache passed in.

It computes what ``model.gpt.GPT`` computes, for the new tokens of a step alone. It owns its
weights: they are copied from the state dict into the layout that the kernels of the device want, so
that the training model can still be trained, saved and exported. ``load_weights`` refreshes them in
place.

Legend: N tokens of a step, of any sequences; C = n_embd; H heads, Hkv key/value heads, D head size;
V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_ray.engine.linear import Linear, make_linears, min_num_tokens
from nanochat_ray.engine.native import Native
from nanochat_ray.engine.operators import Operators, TorchOperators
from nanochat_ray.engine.precision import table_dtype
from nanochat_ray.machine import use_triton
from nanochat_ray.model.config import COMMON_OPTIONS, ModelConfig, has_value_embedding, windows
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.rotary import rotary_tables, yarn_sharpening

if TYPE_CHECKING:
    from nanochat_ray.engine.triton_forward import PagedKeys, TritonForward

PROJECTIONS = ("c_q", "c_k", "c_v")
"""Attention's projections, which are one matmul here."""
OPTIONS = COMMON_OPTIONS
"""Fields of ``ModelConfig`` that ``InferenceModel`` computes; others are refused."""


class AttentionCache(Protocol):
    """Keys and values of earlier tokens, prepared for the tokens of one step.

    The model calls ``attend`` once for each layer, in order. The cache stores the new keys and
    values and attends over all that it has of each token's sequence.
    """

    positions: Tensor
    """int64 ``[N]``: the position of each new token in its sequence."""

    @property
    def pages(self) -> PagedKeys | None:
        """The cache itself, if fused kernels may write to its pages."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        """``q [N, H, D]``, ``k`` and ``v [N, Hkv, D]`` → ``[N, H, D]``, with scores q·k / √D.

        A token sees itself and the ``window`` tokens before it, all of them if -1.
        """
        ...


@dataclass(frozen=True)
class Layer:
    """A transformer block's weights."""

    qkv: Linear
    attention_output: Linear
    mlp_input: Linear
    mlp_output: Linear
    value_gate: Linear | None
    head_gate: Linear | None
    value_embedding: Tensor | None
    """``[vocabulary, Hkv * D]``"""
    window: int


class InferenceModel:
    """A forward is a pure function of the tokens, the cache and the weights.

    Logits of a token do not depend on the other tokens of a step, if it has at least
    ``min_num_tokens`` (see ``linear``).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        *,
        max_model_len: int = 0,
        dtype: torch.dtype = torch.float32,
        weight_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        native: Native | None = None,
        is_batch_invariant: bool = False,
    ):
        """``weights`` is a state dict of ``GPT(config)``, in any floating dtype, on any device.

        ``max_model_len`` bounds the positions, beside the model's own context. Activations have
        ``dtype``, weights ``weight_dtype``, by default the same (see ``precision``). With
        ``native``, which is for a CPU and float32 activations, the kernels in C compute, else torch
        does; on a GPU ``is_batch_invariant`` chooses matmuls that do not depend on the batch.
        ValueError as ``load_weights``, and for an option that is not computed here.
        """
        _check_options(config)
        weight_dtype = weight_dtype or dtype
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.native = native
        with torch.device("meta"):
            layout = GPT(config)
        self._shapes = {name: tensor.shape for name, tensor in layout.state_dict().items()}
        self.check_weights(weights)
        self._ops: Operators = _operators(self.device) if native is None else native
        self._sources = _matmul_sources(layout)
        sizes = [
            (sum(self._shapes[name][0] for name in sources), self._shapes[sources[0]][1])
            for sources in self._sources.values()
        ]
        linears = make_linears(sizes, weight_dtype, self.device, native, is_batch_invariant)
        self.linears = dict(zip(self._sources, linears, strict=True))
        in_matmuls = {name for sources in self._sources.values() for name in sources}
        self.tensors = {
            name: torch.zeros(shape, dtype=table_dtype(weight_dtype), device=self.device)
            for name, shape in self._shapes.items()
            if name not in in_matmuls
        }
        """Embedding tables and scalars, by their name in a state dict."""
        self.max_positions = max(max_model_len, config.context_len)
        tables = rotary_tables(
            self.max_positions,
            config.head_dim,
            config.rope_base,
            train_length=config.sequence_len,
            factor=config.rope_factor,
        )
        self.cos, self.sin = (table.to(self.device, dtype) for table in tables)
        # The scales on q and on k only act through the product q·k.
        self.q_scale = config.qk_scale**2 * yarn_sharpening(config.rope_factor)
        self.layers = [self._layer(i) for i in range(config.n_layer)]
        self._triton_forward = self._make_triton_forward() if use_triton(self.device) else None
        for _ in self._copy(weights):
            pass
        uses_mkl = self.device.type == "cpu" and native is None
        self.min_num_tokens = min_num_tokens(sizes, weight_dtype) if uses_mkl else 1

    def _layer(self, i: int) -> Layer:
        config, at = self.config, f"transformer.h.{i}."
        has_values = config.value_embeds and has_value_embedding(i, config.n_layer)
        window = windows(config)[i]
        return Layer(
            qkv=self.linears[at + "attn.c_qkv"],
            attention_output=self.linears[at + "attn.c_proj"],
            mlp_input=self.linears[at + "mlp.c_fc"],
            mlp_output=self.linears[at + "mlp.c_proj"],
            value_gate=self.linears[at + "attn.ve_gate"] if has_values else None,
            head_gate=self.linears[at + "attn.head_gate"] if config.attention_gate else None,
            value_embedding=self.tensors[f"value_embeds.{i}.weight"] if has_values else None,
            window=window if window < self.max_positions - 1 else -1,
        )

    def _make_triton_forward(self) -> TritonForward | None:
        """None where an option is computed by ``hidden`` alone."""
        from nanochat_ray.engine.triton_forward import OPTIONS, TritonForward

        if self.config.options_beyond(OPTIONS):
            return None
        layers, linears, tensors = self.layers, self.linears, self.tensors
        rotary = self.cos, self.sin
        return TritonForward(
            self.config, layers, linears, tensors, rotary, self.q_scale, self.dtype
        )

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """ValueError that names a tensor if these are not the weights of such a model."""
        for name, shape in self._shapes.items():
            if name not in weights:
                raise ValueError(f"weights: {name} is missing")
            tensor = weights[name]
            if tensor.shape != shape:
                sizes = f"{tuple(tensor.shape)}, expected {tuple(shape)}"
                raise ValueError(f"weights: {name} has the shape {sizes}")
            if not tensor.is_floating_point():
                raise ValueError(f"weights: {name} has the dtype {tensor.dtype}, not a float")
        unknown = next((name for name in weights if name not in self._shapes), None)
        if unknown is not None:
            raise ValueError(f"weights: {unknown} is not a tensor of this model")

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Replaces all weights in place: addresses stay, as CUDA graphs need.

        Keys and values that a cache has from before are of the old weights: the caller
        drops them. ValueError that names a tensor with a wrong name, shape or dtype; then nothing
        has changed.
        """
        for _ in self.load_steps(weights):
            pass

    def load_steps(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """``load_weights``, a tensor at a time. Until the end the weights are mixed."""
        self.check_weights(weights)
        yield from self._copy(weights)

    @torch.inference_mode()
    def _copy(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        for name, sources in self._sources.items():
            parts = [weights[source].to(self.device) for source in sources]
            self.linears[name].load(torch.cat(parts) if len(parts) > 1 else parts[0])
            yield
        for name, tensor in self.tensors.items():
            # Converted on the device: the host would take longer than the copy.
            tensor.copy_(weights[name].to(self.device))
            yield

    def hidden(self, ids_N: Tensor, previous_N: Tensor, cache: AttentionCache) -> Tensor:
        """Final normalised activations ``[N, C]`` of the tokens ``ids_N`` (int64).

        ``previous_N`` is the token before each one in its sequence, -1 at a sequence's start: all
        that a layer needs of earlier tokens beside keys and values.
        """
        config = self.config
        if self._triton_forward is not None and cache.pages is not None:
            return self._triton_forward.hidden(ids_N, previous_N, cache.pages)
        cos, sin = self.cos[cache.positions], self.sin[cache.positions]
        x = self._embed(ids_N)
        if config.smear:
            x = self._smear(x, ids_N, previous_N)
        x0, middle = x, None
        skip_outputs: list[Tensor] = []
        pairs = config.n_layer // 2 if config.skips else 0
        for i, layer in enumerate(self.layers):
            if config.residual_scalars:
                scale, scale_0 = self.tensors["resid_lambdas"][i], self.tensors["x0_lambdas"][i]
                x = scale * x + scale_0 * x0
            if pairs and i >= config.n_layer - pairs:
                x = x + self._skip(config.n_layer - 1 - i, x0) * skip_outputs.pop()
            x = x + self._attention(i, layer, self._norm(x), ids_N, (cos, sin), cache)
            x = x + self._mlp(layer, self._norm(x))
            if i < pairs:
                skip_outputs.append(x)
            if config.backout and i == config.n_layer // 2:
                middle = x
        if middle is not None:
            x = x - self.tensors["backout_lambda"] * middle
        return self._norm(x)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 ``[N, V]`` from ``hidden [N, C]``, soft-capped (Gemma 2), in ``out`` if given."""
        logits = self.linears["lm_head"](hidden)[:, : self.config.vocab_size]
        return self._ops.softcap(logits, self.config.softcap, out)

    def _norm(self, x: Tensor) -> Tensor:
        return self._ops.rms_norm(x, self.config.norm_eps)

    def _embed(self, ids: Tensor) -> Tensor:
        embeddings = F.embedding(ids, self.tensors["transformer.wte.weight"])
        return self._norm(embeddings.to(self.dtype))

    def _smear(self, x: Tensor, ids: Tensor, previous: Tensor) -> Tensor:
        """Adds a gated share of the previous token's embedding."""
        before = self._embed(previous.clamp_min(0)) * (previous >= 0).to(x.dtype)[:, None]
        smear_gate = self.linears["smear_gate"]
        gate = self._ops.sigmoid(smear_gate(x[:, : smear_gate.in_features]))  # [N, 1]
        if self.config.document_start >= 0:
            starts = ids == self.config.document_start
            gate = gate.masked_fill(starts[:, None], 0.0)
        return x + self.tensors["smear_lambda"] * gate * before

    def _skip(self, pair: int, x0: Tensor) -> Tensor:
        """Factor ``[N, 1]`` on the first-half layer ``pair``'s output."""
        skip_gate = self.linears[f"skip_gates.{pair}"]
        gate = self._ops.sigmoid(skip_gate(x0[:, : skip_gate.in_features]))
        return self.tensors["skip_lambdas"][pair] * gate

    def _attention(
        self,
        i: int,
        layer: Layer,
        x: Tensor,
        ids: Tensor,
        angles: tuple[Tensor, Tensor],
        cache: AttentionCache,
    ) -> Tensor:
        c = self.config
        N, H, Hkv = x.size(0), c.n_head, c.n_kv_head
        qkv = layer.qkv(x).view(N, H + 2 * Hkv, c.head_dim)
        qk = self._ops.rotary_qk_norm(qkv[:, : H + Hkv], *angles, c.norm_eps)
        q, k, v = qk[:, :H], qk[:, H:], qkv[:, H + Hkv :]
        if layer.value_gate is not None and layer.value_embedding is not None:
            gate = 3 * self._ops.sigmoid(layer.value_gate(x[:, : layer.value_gate.in_features]))
            v = v + gate.unsqueeze(-1) * F.embedding(ids, layer.value_embedding).view_as(v)
        if self.q_scale != 1:
            q = q * self.q_scale
        y = cache.attend(i, q, k, v, layer.window)
        if layer.head_gate is not None:
            gate = self._ops.sigmoid(layer.head_gate(x[:, : layer.head_gate.in_features]))  # [N, H]
            y = y * gate.unsqueeze(-1)
        return layer.attention_output(y.reshape(N, -1))

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        return layer.mlp_output(self._ops.relu_squared(layer.mlp_input(x)))


def _check_options(config: ModelConfig) -> None:
    if unknown := config.options_beyond(OPTIONS):
        raise ValueError(
            f"the engine does not know {', '.join(unknown)} of ModelConfig: see train/README.md, "
            '"How to add a model option"'
        )


def _operators(device: torch.device) -> Operators:
    if not use_triton(device):
        return TorchOperators()
    from nanochat_ray.engine.triton_operators import TritonOperators

    return TritonOperators()


def _matmul_sources(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The state-dict names of each matmul's weight, by the matmul's name.

    The projections to queries, keys and values are one, ``c_qkv``: their weights are concatenated.
    """
    sources: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        parent, _, own = name.rpartition(".")
        if not isinstance(module, nn.Linear):
            continue
        if own not in PROJECTIONS:
            sources[name] = (f"{name}.weight",)
        elif own == PROJECTIONS[0]:
            sources[f"{parent}.c_qkv"] = tuple(f"{parent}.{p}.weight" for p in PROJECTIONS)
    return sources
