"""The model of a nanochat_ray run for transformers (``trust_remote_code=True``), by itself.

A causal language model with rotary embeddings, QK-norm, squared ReLU, value embeddings, windows,
residual scalars, smear and backout, each as ``config.json`` has it. Names of parameters are
nanochat's. For ``generate`` the cache has each token's embedding behind the first layer's values:
there caches of all kinds keep, reorder (beams) and crop (rejected drafts) it as any value.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_nanochat_ray import NanochatRayConfig


def rms_norm(x, eps):
    return F.rms_norm(x, (x.size(-1),), eps=eps)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        self.config, self.layer, self.window = config, layer, config.windows[layer]
        self.c_q = nn.Linear(width, config.num_attention_heads * head, bias=False)
        self.c_k = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.c_v = nn.Linear(width, config.num_key_value_heads * head, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.ve_gate = None
        if config.value_embeds and config.has_value_embedding(layer):
            channels = min(12, width)
            self.ve_gate = nn.Linear(channels, config.num_key_value_heads, bias=False)

    def rotary_qk_norm(self, x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        x = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
        return rms_norm(x, self.config.norm_eps)

    def forward(self, x, value, angles, mask_of, cache, embedding):
        """``embedding [B, T, C]`` is put into the cache too, unless it is None."""
        B, T, _ = x.shape
        c = self.config
        q = self.rotary_qk_norm(self.c_q(x).view(B, T, -1, c.head_dim), *angles).transpose(1, 2)
        k = self.rotary_qk_norm(self.c_k(x).view(B, T, -1, c.head_dim), *angles).transpose(1, 2)
        v = self.c_v(x).view(B, T, -1, c.head_dim)
        if self.ve_gate is not None:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., : self.ve_gate.in_features]))
            v = v + gate.unsqueeze(-1) * value.view_as(v)
        v = v.transpose(1, 2)
        if cache is not None:
            if embedding is not None:
                shares = embedding.view(B, T, v.size(1), -1).transpose(1, 2)
                v = torch.cat((v, shares), dim=-1)
            k, v = cache.update(k, v, self.layer)
            v = v[..., : c.head_dim]
        groups = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scale = c.qk_scale**2 / c.head_dim**0.5
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_of(self.window, k.size(2)), scale=scale
        )
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.c_proj = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)


class NanochatRayForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanochatRayConfig
    _supports_sdpa = True
    _no_split_modules = ("Block",)

    def __init__(self, config):
        super().__init__(config)
        rows, width, n = config.padded_vocab_size, config.hidden_size, config.num_hidden_layers
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, width),
                "h": nn.ModuleList([Block(config, layer) for layer in range(n)]),
            }
        )
        self.lm_head = nn.Linear(width, rows, bias=False)
        if config.residual_scalars:
            self.resid_lambdas = nn.Parameter(torch.ones(n))
            self.x0_lambdas = nn.Parameter(torch.zeros(n))
        if config.smear:
            self.smear_gate = nn.Linear(min(24, width), 1, bias=False)
            self.smear_lambda = nn.Parameter(torch.zeros(1))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.full((1,), 0.2))
        if config.value_embeds:
            size = config.num_key_value_heads * config.head_dim
            self.value_embeds = nn.ModuleDict(
                {
                    str(i): nn.Embedding(rows, size)
                    for i in range(n)
                    if config.has_value_embedding(i)
                }
            )
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def get_output_embeddings(self):
        return self.lm_head

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.weight.data.normal_(0.0, 0.02)

    def _embed(self, ids):
        return rms_norm(self.transformer["wte"](ids), self.config.norm_eps)

    def _smear(self, x, before):
        """``before [B, 1, C]`` is the embedding before the first token; None at the start."""
        previous = x[:, :-1] if before is None else torch.cat((before, x[:, :-1]), dim=1)
        after = x[:, 1:] if before is None else x
        gate = torch.sigmoid(self.smear_gate(after[..., : self.smear_gate.in_features]))
        blend = after + self.smear_lambda.to(x.dtype) * gate * previous
        return torch.cat((x[:, :1], blend), dim=1) if before is None else blend

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        cache=None,
        **rest: Any,
    ):
        config = self.config
        if attention_mask is not None and attention_mask.dim() == 2 and not attention_mask.all():
            raise ValueError("attention_mask: padding is not supported; give rows of one length")
        # Its name in transformers is changing.
        past_key_values = cache if cache is not None else past_key_values
        if use_cache and past_key_values is None and labels is None:
            past_key_values = DynamicCache()
        start = past_key_values.get_seq_length() if past_key_values is not None else 0
        T = input_ids.size(1)
        x = self._embed(input_ids)
        positions = torch.arange(start, start + T, device=x.device)
        channel = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=x.device)
        theta = torch.outer(positions.float(), config.rope_base ** (-channel / config.head_dim))
        angles = tuple(t.to(x.dtype)[None, :, None] for t in (theta.cos(), theta.sin()))

        def mask_of(window, length):
            distance = positions[:, None] - torch.arange(length, device=x.device)[None]
            visible = distance >= 0
            return visible if window < 0 else visible & (distance <= window)

        embedding, before = None, None
        if config.smear:
            embedding = x
            if start:
                shares = past_key_values.layers[0].values[:, :, start - 1, config.head_dim :]
                before = shares.reshape(x.size(0), 1, -1)
            x = self._smear(x, before)
        x0, middle = x, None
        for i, block in enumerate(self.transformer["h"]):
            if config.residual_scalars:
                x = self.resid_lambdas[i].to(x.dtype) * x + self.x0_lambdas[i].to(x.dtype) * x0
            value = None
            if block.attn.ve_gate is not None:
                value = self.value_embeds[str(i)](input_ids).to(x.dtype)
            norm_x = rms_norm(x, config.norm_eps)
            also = embedding if i == 0 else None
            x = x + block.attn(norm_x, value, angles, mask_of, past_key_values, also)
            x = x + block.mlp(rms_norm(x, config.norm_eps))
            if config.backout and i == config.num_hidden_layers // 2:
                middle = x
        if middle is not None:
            x = x - self.backout_lambda.to(x.dtype) * middle
        x = rms_norm(x, config.norm_eps)[:, -logits_to_keep if logits_to_keep else 0 :]
        logits = self.lm_head(x)[..., : config.vocab_size].float()
        if config.softcap:
            logits = config.softcap * torch.tanh(logits / config.softcap)
        loss = None
        if labels is not None:
            # The Trainer counts on transformers' own loss: it passes num_items_in_batch.
            loss = self.loss_function(logits, labels, vocab_size=config.vocab_size, **rest)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
