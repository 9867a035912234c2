"""A layer of the training model: attention and MLP.

Parameter names are nanochat's, so that its checkpoints load. Dimensions: B sequences of T tokens,
C = n_embd, H heads, Hkv key/value heads, D = C / H.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanochat_ray.machine import use_triton
from nanochat_ray.model.attention import AttentionMask, attend
from nanochat_ray.model.config import GATE_CHANNELS, ModelConfig, has_value_embedding, windows
from nanochat_ray.model.fused import relu_squared, rms_norm
from nanochat_ray.model.linear import Linear, apply_together
from nanochat_ray.model.rotary import rotate, yarn_sharpening


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.window = windows(config)[layer]
        C, D = config.n_embd, config.head_dim
        self.c_q = Linear(C, config.n_head * D)
        self.c_k = Linear(C, config.n_kv_head * D)
        self.c_v = Linear(C, config.n_kv_head * D)
        self.c_proj = Linear(C, C)
        self.gate_channels = min(GATE_CHANNELS, C)
        has_values = config.value_embeds and has_value_embedding(layer, config.n_layer)
        self.ve_gate = Linear(self.gate_channels, config.n_kv_head) if has_values else None
        self.head_gate = (
            Linear(self.gate_channels, config.n_head) if config.attention_gate else None
        )
        # The scales on q and on k only act through the product q·k.
        self.scale = config.qk_scale**2 * yarn_sharpening(config.rope_factor) / D**0.5
        self.in_float64 = False
        """Whether scores and weighted sums have float64 (``GPT.use_float64_attention``)."""

    def forward(
        self,
        x: Tensor,
        value: Tensor | None,
        angles: tuple[Tensor, Tensor],
        mask: AttentionMask,
    ) -> Tensor:
        B, T, _ = x.shape
        c = self.config
        layers = (self.c_q, self.c_k, self.c_v)
        if use_triton(x.device):
            # On a GPU narrow matmuls are slow, and their weights are copied to be cast anyway.
            from nanochat_ray.model.triton_rotary import rotary_norm

            cos, sin = (table[0, :, 0] for table in angles)
            qkv = apply_together(x, layers)
            q, k, v = rotary_norm(qkv, cos, sin, num_heads=c.n_head, eps=c.norm_eps)
        else:
            q, k, v = (layer(x).view(B, T, -1, c.head_dim) for layer in layers)
            q, k = (rms_norm(rotate(heads, *angles), c.norm_eps) for heads in (q, k))  # QK-norm
        if value is not None and self.ve_gate is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))  # [B, T, Hkv]
            v = v + gate.unsqueeze(-1) * value.view_as(v)
        if self.in_float64:
            y = attend(q.double(), k.double(), v.double(), mask, self.scale).to(q.dtype)
        else:
            y = attend(q, k, v, mask, self.scale)
        if self.head_gate is not None:
            y = y * torch.sigmoid(self.head_gate(x[..., : self.gate_channels])).unsqueeze(-1)
        return self.c_proj(y.reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(relu_squared(self.c_fc(x)))


class Mix(NamedTuple):
    """What a layer adds to the residual stream ``x [B, T, C]`` before it reads it."""

    x0: Tensor
    """The start of the stream ``[B, T, C]``."""
    lambdas: tuple[Tensor, Tensor] | None
    """0-d factors on ``x`` and on ``x0``."""
    skip: Tensor | None
    """Added, ``[B, T, C]``: a gated share of a layer of the first half."""


class Block(nn.Module):
    """One layer: a pure function of its arguments and parameters."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        mix: Mix,
        value: Tensor | None,
        angles: tuple[Tensor, Tensor],
        mask: AttentionMask,
    ) -> Tensor:
        """The residual stream ``x [B, T, C]`` after the layer; ``value [B, T, Hkv D]`` is the
        tokens' value embedding."""
        eps = self.config.norm_eps
        if mix.lambdas is not None:
            x = mix.lambdas[0] * x + mix.lambdas[1] * mix.x0
        if mix.skip is not None:
            x = x + mix.skip
        x = x + self._drop(self.attn(rms_norm(x, eps), value, angles, mask))
        return x + self._drop(self.mlp(rms_norm(x, eps)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training) if self.config.dropout else x


def run_block(block: Block, *args: Any, recompute: bool) -> Tensor:
    """``block(*args)``; with ``recompute`` its activations are computed again for the gradients."""
    output = checkpoint(block, *args, use_reentrant=False) if recompute else block(*args)
    return cast(Tensor, output)
