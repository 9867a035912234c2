"""The training model around its layers (``block.py``). ``engine.model`` computes the same with a KV
cache.

Parameter names are nanochat's, so that its checkpoints load. Dimensions: B sequences of T tokens,
C = n_embd, H heads, Hkv key/value heads, D = C / H.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_ray.model.attention import AttentionMask, attention_mask
from nanochat_ray.model.block import Attention, Block, Mix, run_block
from nanochat_ray.model.config import (
    GATE_CHANNELS,
    SMEAR_GATE_CHANNELS,
    ModelConfig,
    has_value_embedding,
)
from nanochat_ray.model.embedding import embed, token_order
from nanochat_ray.model.fp8 import MULTIPLE
from nanochat_ray.model.fused import rms_norm
from nanochat_ray.model.linear import Linear
from nanochat_ray.model.loss import softcap, softcap_cross_entropy, token_logprobs
from nanochat_ray.model.rotary import rotary_tables


def _start(
    x: Tensor,
    ids: Tensor,
    smear: tuple[Tensor, Tensor] | None,
    document_start: int,
    eps: float,
) -> Tensor:
    """The residual stream ``[B, T, C]`` of token embeddings ``x``; with ``smear`` (a gate's weight
    and a factor) a share of the previous token's is added, except at a document's start."""
    x = rms_norm(x, eps)
    if smear is None:
        return x
    gate_weight, factor = smear
    previous, x_rest = x[:, :-1], x[:, 1:]
    gate = torch.sigmoid(F.linear(x_rest[..., : gate_weight.size(1)], gate_weight.to(x.dtype)))
    if document_start >= 0:
        starts = ids[:, 1:] == document_start
        gate = gate.masked_fill(starts.unsqueeze(-1), 0.0)
    x_rest = x_rest + factor.to(x.dtype) * gate * previous
    return torch.cat((x[:, :1], x_rest), dim=1)


def _end(x: Tensor, middle: Tensor | None, factor: Tensor | None, eps: float) -> Tensor:
    """The normalised stream, without a share of the ``middle`` layer's output."""
    if middle is not None and factor is not None:
        x = x - factor.to(x.dtype) * middle
    return rms_norm(x, eps)


def _embedding(vocab: int, width: int) -> nn.Embedding:
    """A table of zeros, which ``init_weights`` or a checkpoint fills. torch's own random values
    would be wasted, and on the meta device they import torch.compile, which takes seconds."""
    return nn.Embedding(vocab, width, _weight=torch.zeros(vocab, width))


class GPT(nn.Module):
    """Weights are float32; activations have ``compute_dtype``; logits and losses are float32."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        vocab, C, n = config.padded_vocab_size, config.n_embd, config.n_layer
        self.transformer = nn.ModuleDict(
            {
                "wte": _embedding(vocab, C),
                "h": nn.ModuleList([Block(config, layer) for layer in range(n)]),
            }
        )
        self.lm_head = Linear(C, vocab)
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(n))
            self.x0_lambdas = nn.Parameter(torch.zeros(n))
        if config.smear:
            self.smear_gate = Linear(min(SMEAR_GATE_CHANNELS, C), 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.zeros(1))
        if config.skips:
            self.skip_gates = nn.ModuleList(
                [Linear(min(GATE_CHANNELS, C), 1) for _ in range(n // 2)]
            )
            self.skip_lambdas = nn.Parameter(torch.zeros(n // 2))
        if config.value_embeds:
            kv = config.n_kv_head * config.head_dim
            layers = [i for i in range(n) if has_value_embedding(i, n)]
            self.value_embeds = nn.ModuleDict({str(i): _embedding(vocab, kv) for i in layers})
        self._angles: tuple[Tensor, Tensor] | None = None
        self._run_block: Callable[..., Tensor] = run_block
        self._run_start: Callable[..., Tensor] = _start
        self._run_end: Callable[..., Tensor] = _end
        self.window_share = 1.0
        """Share of the attention windows in training; a schedule may let it grow to 1."""
        self.checkpoint_activations = False
        """In training keep only the inputs of blocks, and recompute the rest for the gradients."""

    @property
    def wte(self) -> nn.Embedding:
        return cast(nn.Embedding, self.transformer["wte"])

    @property
    def blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.transformer["h"])

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights by nanochat's scheme, equal on all devices for equal CPU generators."""
        C, n = self.config.n_embd, self.config.n_layer

        def fill(p: Tensor, low: float, high: float) -> None:
            p.copy_(torch.empty(p.shape).uniform_(low, high, generator=generator))

        def normal(p: Tensor, std: float) -> None:
            p.copy_(torch.empty(p.shape).normal_(0.0, std, generator=generator))

        bound = (3 / C) ** 0.5  # a uniform of standard deviation 1 / sqrt(C), without outliers
        normal(self.wte.weight, 0.8)
        normal(self.lm_head.weight, 0.001)
        for block in self.blocks:
            for layer in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                fill(layer.weight, -bound, bound)
            fill(block.mlp.c_fc.weight, -0.4 * bound, 0.4 * bound)
            # Each block starts as the identity.
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.ve_gate is not None:
                fill(block.attn.ve_gate.weight, 0.0, 0.02)
            if block.attn.head_gate is not None:
                block.attn.head_gate.weight.zero_()
        share = torch.arange(n) / max(n - 1, 1)
        if self.config.residual_scalars:
            decay = self.config.residual_decay
            self.resid_lambdas.copy_(torch.full((n,), decay) if decay else 1.15 - 0.10 * share)
            self.x0_lambdas.copy_(0.20 - 0.15 * share)
        if self.config.smear:
            fill(self.smear_gate.weight, 0.0, 0.02)
            self.smear_lambda.zero_()
        if self.config.backout:
            self.backout_lambda.fill_(0.2)
        if self.config.skips:
            self.skip_lambdas.zero_()
            for gate in self.skip_gates:
                cast(Linear, gate).weight.zero_()
        if self.config.value_embeds:
            for table in self.value_embeds.values():
                fill(cast(nn.Embedding, table).weight, -bound, bound)

    def use_fp8(self) -> None:
        """Makes the blocks' large matmuls fp8 in training (``model/fp8.py``)."""
        for block in self.blocks:
            for layer in block.modules():
                if isinstance(layer, Linear) and not any(s % MULTIPLE for s in layer.weight.shape):
                    layer.fp8 = True

    def use_float64_attention(self) -> None:
        """On a CPU, for log-probabilities that are compared: most of their rounding is that of
        attention scores in float32 (rl/BENCHMARKS.md)."""
        for block in self.blocks:
            block.attn.in_float64 = True

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compiles the layers and what is before and after them, for training and validation.

        Each layer is a graph of its own, and layers of one kind share it: depth does not lengthen
        the compilation, and the gradients of a layer are complete as soon as its backward has
        run, so that their reduction overlaps with that of the layers before it. Shapes are
        constants: each is compiled once, at its first use.
        """
        # Of kinds of layers times shapes. Beyond it torch would run uncompiled without a word.
        torch._dynamo.config.recompile_limit = 64
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # Kernels that were chosen by their time would sum in another order in the next process.
        torch._inductor.config.deterministic = True
        self._run_block, self._run_start, self._run_end = (
            torch.compile(function, dynamic=False, backend=backend)
            for function in (run_block, _start, _end)
        )

    def _window(self, layer: Attention, T: int) -> int:
        """The layer's window at this time: while it grows, a multiple of 64."""
        if self.window_share >= 1 or not self.training:
            return layer.window
        full_window = min(T, layer.window)
        return min(full_window, max(64, round(full_window * self.window_share / 64) * 64))

    def _rotary(self, T: int) -> tuple[Tensor, Tensor]:
        """cos and sin ``[1, T, 1, D / 2]``."""
        device = self.wte.weight.device
        angles = self._angles
        if angles is None or angles[0].size(0) < T or angles[0].device != device:
            c = self.config
            length = max(T, c.context_len)
            with torch.inference_mode(False):  # or they could not be used in training
                cos, sin = rotary_tables(
                    length,
                    c.head_dim,
                    c.rope_base,
                    train_length=c.sequence_len,
                    factor=c.rope_factor,
                )
            dtype = self.compute_dtype
            angles = self._angles = (cos.to(device, dtype), sin.to(device, dtype))
        cos, sin = angles
        return cos[None, :T, None], sin[None, :T, None]

    def hidden(self, ids: Tensor, *, eager: bool = False) -> Tensor:
        """Final normalised activations ``[B, T, C]`` of ``ids [B, T]`` int64, from position 0.

        ``eager`` runs uncompiled layers, for shapes that come once.
        """
        config = self.config
        angles, masks = self._rotary(ids.size(1)), self._masks(ids)
        run_start, run_layer, run_end = (
            (_start, run_block, _end)
            if eager
            else (self._run_start, self._run_block, self._run_end)
        )
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        order = token_order(ids, config.padded_vocab_size)
        smear = (self.smear_gate.weight, self.smear_lambda) if config.smear else None
        x = embed(self.wte.weight, ids, order, self.compute_dtype)
        x = self._drop(run_start(x, ids, smear, config.document_start, config.norm_eps))
        # A view: where both arguments are one tensor, the first layer would be another graph.
        x0, middle = x.view_as(x), None
        lambdas = self._lambdas(x.dtype)
        skip_outputs: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            skip = None
            if config.skips and i >= config.n_layer - len(self.skip_gates):
                skip = self._skip(config.n_layer - 1 - i, x0) * skip_outputs.pop()
            mix = Mix(x0, lambdas[i] if lambdas else None, skip)
            value = None
            if config.value_embeds and str(i) in self.value_embeds:
                # Not in the compiled layer, where its gradient would have no order.
                table = cast(nn.Embedding, self.value_embeds[str(i)]).weight
                value = embed(table, ids, order, x.dtype)
            x = run_layer(block, x, mix, value, angles, masks[i], recompute=recompute)
            if config.skips and i < len(self.skip_gates):
                skip_outputs.append(x)
            if config.backout and i == config.n_layer // 2:
                middle = x
        factor = self.backout_lambda if config.backout else None
        return run_end(x, middle, factor, config.norm_eps)

    def _masks(self, ids: Tensor) -> list[AttentionMask]:
        """Each layer's mask for ``ids [B, T]``; layers with one window share it."""
        documents = None
        if self.config.document_start >= 0:
            documents = (ids == self.config.document_start).cumsum(dim=1)
        spans = [self._window(block.attn, ids.size(1)) for block in self.blocks]
        flex = ids.device.type == "cuda"
        masks = {w: attention_mask(ids, w, documents, flex=flex) for w in set(spans)}
        return [masks[window] for window in spans]

    def _lambdas(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Each layer's 0-d factors on the residual stream and on its start; none without them."""
        if not self.config.residual_scalars:
            return []
        # With float32 scalars the result would be promoted: cast them, not the stream.
        resid, first = self.resid_lambdas.to(dtype).unbind(), self.x0_lambdas.to(dtype).unbind()
        return list(zip(resid, first, strict=True))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x

    def _skip(self, pair: int, x0: Tensor) -> Tensor:
        """Factor ``[B, T, 1]`` on the first-half layer ``pair``'s output."""
        gate = cast(Linear, self.skip_gates[pair])
        return self.skip_lambdas[pair].to(x0.dtype) * torch.sigmoid(
            gate(x0[..., : gate.in_features])
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 ``[..., vocab_size]`` from ``hidden [..., C]``, soft-capped (Gemma 2)."""
        logits = self.lm_head(hidden)[..., : self.config.vocab_size].float()
        return softcap(logits, self.config.softcap)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, float32 ``[B, T, vocab_size]``, of ``ids [B, T]`` int64."""
        return self.logits(self.hidden(ids))

    def loss(
        self, ids: Tensor, targets: Tensor, reduction: Literal["sum", "mean", "none"] = "mean"
    ) -> Tensor:
        """Cross-entropy in nats of ``targets [B, T]`` int64, without those that are -1.

        A float32 scalar; with "none" ``[B, T]``, 0 where a target is -1.
        """
        hidden = self.hidden(ids)
        if reduction == "none":
            logits = self.logits(hidden).flatten(0, 1)
            losses = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
            return losses.view_as(targets)
        total = softcap_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            cap=self.config.softcap,
            vocab=self.config.vocab_size,
        )
        return total if reduction == "sum" else total / (targets >= 0).sum().clamp_min(1)

    def token_logprobs(
        self, ids: Tensor, targets: Tensor, rows: Tensor, temperature: float = 1.0
    ) -> Tensor:
        """Log-probabilities, float32 ``[N]``, in the distribution at ``temperature``. ``rows [N]``
        int64 are the places of the N tokens in ``targets [B, T]`` int64, flattened."""
        return token_logprobs(
            self.hidden(ids).flatten(0, 1)[rows],
            self.lm_head.weight,
            targets.flatten()[rows],
            cap=self.config.softcap,
            vocab=self.config.vocab_size,
            temperature=temperature,
        )
