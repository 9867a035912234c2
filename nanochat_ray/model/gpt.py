"""The transformer, on a page: one forward for training and for cached inference.

Parameter names are nanochat's, so that its checkpoints load. Dimensions: B rows, T tokens,
C = n_embd, H heads, Hkv key/value heads, D = C / H.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat_ray.config import ModelConfig
from nanochat_ray.model.attention import AttentionContext, TrainingAttention
from nanochat_ray.model.fp8 import MULTIPLE
from nanochat_ray.model.layers import Linear, Norm, ReluSquared, Softcap, Turn
from nanochat_ray.model.loss import softcap_cross_entropy
from nanochat_ray.model.rotary import rotary_tables, yarn_sharpening
from nanochat_ray.scaling import has_value_embedding, windows

GATE_CHANNELS, SMEAR_GATE_CHANNELS = 12, 24
"""Channels of the residual stream that gates look at (modded-nanogpt, nanochat)."""


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.config = layer, config
        self.window = windows(config)[layer]
        C, D = config.n_embd, config.head_dim
        self.c_q = Linear(C, config.n_head * D)
        self.c_k = Linear(C, config.n_kv_head * D)
        self.c_v = Linear(C, config.n_kv_head * D)
        self.c_qkv: nn.Module | None = None
        """The three above in one, where an engine puts them together; it does without them then."""
        self.c_proj = Linear(C, C)
        self.gate_channels = min(GATE_CHANNELS, C)
        gated = config.value_embeds and has_value_embedding(layer, config.n_layer)
        self.ve_gate = Linear(self.gate_channels, config.n_kv_head) if gated else None
        self.head_gate = (
            Linear(self.gate_channels, config.n_head) if config.attention_gate else None
        )
        self.turn: nn.Module = Turn()
        # The scale on q and on k acts through their product alone.
        self.sharpen = config.qk_scale**2 * yarn_sharpening(config.rope_factor)

    def forward(
        self,
        x: Tensor,
        value: Tensor | None,
        angles: tuple[Tensor, Tensor],
        attend: TrainingAttention | AttentionContext,
        window: int,
    ) -> Tensor:
        B, T, _ = x.shape
        c = self.config
        if self.c_qkv is None:
            q = self.c_q(x).view(B, T, c.n_head, c.head_dim)
            k = self.c_k(x).view(B, T, c.n_kv_head, c.head_dim)
            v = self.c_v(x).view(B, T, c.n_kv_head, c.head_dim)
            q, k = self.turn(q, angles, c.norm_eps), self.turn(k, angles, c.norm_eps)
        else:
            heads = self.c_qkv(x).view(B, T, -1, c.head_dim)
            turned = self.turn(heads[:, :, : -c.n_kv_head], angles, c.norm_eps)
            q, k = turned[:, :, : c.n_head], turned[:, :, c.n_head :]
            v = heads[:, :, -c.n_kv_head :]
        if value is not None and self.ve_gate is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))  # [B, T, Hkv]
            v = v + gate.unsqueeze(-1) * value.view_as(v)
        if isinstance(attend, TrainingAttention):
            y = attend(q, k, v, window, self.sharpen / c.head_dim**0.5)
        else:
            sharp = q if self.sharpen == 1 else q * self.sharpen
            y = attend.attend(self.layer, sharp, k, v, window)
        if self.head_gate is not None:
            y = y * torch.sigmoid(self.head_gate(x[..., : self.gate_channels])).unsqueeze(-1)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.activation: nn.Module = ReluSquared()

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(self.activation(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)


class GPT(nn.Module):
    """Weights are float32; activations have ``compute_dtype``; logits and losses are float32."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        rows, C, n = config.padded_vocab_size, config.n_embd, config.n_layer
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, C),
                "h": nn.ModuleList([Block(config, layer) for layer in range(n)]),
            }
        )
        self.lm_head = Linear(C, rows)
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(n))
            self.x0_lambdas = nn.Parameter(torch.zeros(n))
        if config.smear:
            self.smear_gate = Linear(min(SMEAR_GATE_CHANNELS, C), 1)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        if config.skips:
            self.skip_gates = nn.ModuleList(
                [Linear(min(GATE_CHANNELS, C), 1) for _ in range(n // 2)]
            )
            self.skip_lambdas = nn.Parameter(torch.zeros(n // 2))
        if config.value_embeds:
            kv = config.n_kv_head * config.head_dim
            layers = [i for i in range(n) if has_value_embedding(i, n)]
            self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(rows, kv) for i in layers})
        self.norm: nn.Module = Norm(config.norm_eps)
        self.softcap: nn.Module = Softcap(config.softcap)
        self._angles: tuple[Tensor, Tensor] | None = None
        self.window_share = 1.0
        """Share of the windows that training sees; a schedule may let it grow."""
        self.checkpoint_activations = False
        """In training keep only the inputs of blocks, and compute the rest again when needed."""

    @property
    def wte(self) -> nn.Embedding:
        return cast(nn.Embedding, self.transformer["wte"])

    @property
    def blocks(self) -> Iterable[Block]:
        return cast(Iterable[Block], self.transformer["h"])

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Random weights in nanochat's scheme, equal for equal CPU generators on any device."""
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
            # Each block begins as the identity.
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
        """From now on the blocks' large products are fp8 in training (``model/fp8.py``)."""
        for block in self.blocks:
            for layer in block.modules():
                if isinstance(layer, Linear) and not any(s % MULTIPLE for s in layer.weight.shape):
                    layer.fp8 = True

    def compile_hidden(self) -> None:
        """From now on the layers run compiled, in training and in validation."""
        self.hidden = torch.compile(self.hidden)  # type: ignore[method-assign]

    def _window(self, layer: Attention, T: int) -> int:
        """The layer's window now; a schedule's steps are multiples of 64."""
        if self.window_share >= 1 or not self.training:
            return layer.window
        whole = T if layer.window < 0 else layer.window
        return min(whole, max(64, round(whole * self.window_share / 64) * 64))

    def _rotary(self, T: int, context: AttentionContext | None) -> tuple[Tensor, Tensor]:
        """cos and sin ``[B or 1, T, 1, D/2]`` for the new tokens."""
        device = self.wte.weight.device
        last = T if context is None else context.end
        angles = self._angles
        if angles is None or angles[0].size(0) < last or angles[0].device != device:
            c = self.config
            length = max(last, c.context_len)
            cos, sin = rotary_tables(
                length, c.head_dim, c.rope_base, trained=c.sequence_len, factor=c.rope_factor
            )
            angles = self._angles = (cos.to(device), sin.to(device))
        cos, sin = (table.to(self.compute_dtype) for table in angles)
        if context is None:
            return cos[None, :T, None], sin[None, :T, None]
        return cos[context.positions].unsqueeze(2), sin[context.positions].unsqueeze(2)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.norm(self.wte(ids).to(self.compute_dtype))

    def _smear(self, x: Tensor, ids: Tensor, prev_ids: Tensor | None) -> Tensor:
        """Adds a gated share of the token before; ``prev_ids [B]`` stand before the first ones."""
        before = x[:, :-1]
        if prev_ids is not None:
            first = self._embed(prev_ids.clamp_min(0)) * (prev_ids >= 0).to(x.dtype)[:, None]
            before = torch.cat((first[:, None], before), dim=1)
        after = x[:, x.size(1) - before.size(1) :]
        gate = torch.sigmoid(self.smear_gate(after[..., : self.smear_gate.in_features]))
        if self.config.document_start >= 0:
            starts = ids[:, ids.size(1) - before.size(1) :] == self.config.document_start
            gate = gate.masked_fill(starts.unsqueeze(-1), 0.0)
        mixed = after + self.smear_lambda.to(x.dtype) * gate * before
        return mixed if prev_ids is not None else torch.cat((x[:, :1], mixed), dim=1)

    def _block(
        self,
        i: int,
        block: Block,
        x: Tensor,
        x0: Tensor,
        skip: Tensor | None,
        ids: Tensor,
        angles: tuple[Tensor, Tensor],
        attend: TrainingAttention | AttentionContext,
    ) -> Tensor:
        """Layer ``i`` on the residual stream ``x [B, T, C]``; ``x0`` is what it began with."""
        config = self.config
        if config.residual_scalars:
            # In float32 scalars the product would be promoted: cast them, not the stream.
            resid, first = self.resid_lambdas[i].to(x.dtype), self.x0_lambdas[i].to(x.dtype)
            x = resid * x + first * x0
        if skip is not None:
            x = x + self._skip(config.n_layer - 1 - i, x0) * skip
        value = None
        if config.value_embeds and str(i) in self.value_embeds:
            value = self.value_embeds[str(i)](ids).to(x.dtype)
        window = self._window(block.attn, ids.size(1))
        attended = block.attn(self.norm(x), value, angles, attend, window)
        x = x + self._drop(attended)
        return x + self._drop(block.mlp(self.norm(x)))

    def hidden(
        self, ids: Tensor, context: AttentionContext | None = None, prev_ids: Tensor | None = None
    ) -> Tensor:
        """Final normalised activations ``[B, T, C]`` of ``ids [B, T]`` int64.

        Without a context the rows start at position 0. With one, ``prev_ids [B]`` is the token
        before each row's first (-1 at the start of a sequence): all that a layer needs of earlier
        tokens beside keys and values.
        """
        config = self.config
        angles = self._rotary(ids.size(1), context)
        attend: TrainingAttention | AttentionContext
        if context is not None:
            attend = context
        elif config.document_start >= 0:
            attend = TrainingAttention((ids == config.document_start).cumsum(dim=1))
        else:
            attend = TrainingAttention()
        x = self._embed(ids)
        if config.smear:
            x = self._smear(x, ids, prev_ids)
        x = self._drop(x)
        x0, middle = x, None
        mirrored: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            skip = None
            if config.skips and i >= config.n_layer - len(self.skip_gates):
                skip = mirrored.pop()
            args = (i, block, x, x0, skip, ids, angles, attend)
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(self._block, *args, use_reentrant=False)
            else:
                x = self._block(*args)
            if config.skips and i < len(self.skip_gates):
                mirrored.append(x)
            if config.backout and i == config.n_layer // 2:
                middle = x
        if middle is not None:
            x = x - self.backout_lambda.to(x.dtype) * middle
        return self.norm(x)

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
        return self.softcap(logits)

    def forward(
        self, ids: Tensor, context: AttentionContext | None = None, prev_ids: Tensor | None = None
    ) -> Tensor:
        """Logits, float32 ``[B, T, vocab_size]``."""
        return self.logits(self.hidden(ids, context, prev_ids))

    def loss(
        self, ids: Tensor, targets: Tensor, reduction: Literal["sum", "mean", "none"] = "mean"
    ) -> Tensor:
        """Cross-entropy in nats of ``targets [B, T]`` int64; those that are -1 do not count.

        "none" gives ``[B, T]`` with 0 where nothing counts.
        """
        hidden = self.hidden(ids)
        if reduction == "none":
            logits = self.logits(hidden).flatten(0, 1)
            each = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none")
            return each.view_as(targets)
        total = softcap_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            targets.flatten(),
            cap=self.config.softcap,
            vocab=self.config.vocab_size,
        )
        return total if reduction == "sum" else total / (targets >= 0).sum().clamp_min(1)
