"""The configuration of a nanochat_ray run for transformers (``trust_remote_code=True``)."""

from __future__ import annotations

from transformers import PretrainedConfig


class NanochatRayConfig(PretrainedConfig):
    model_type = "nanochat_ray"

    def __init__(
        self,
        vocab_size=300,
        padded_vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        windows=(-1, -1),
        value_embeds=True,
        residual_scalars=True,
        smear=True,
        backout=True,
        qk_scale=1.2,
        softcap=15.0,
        rope_base=100_000.0,
        norm_eps=2**-23,
        **rest,
    ):
        self.vocab_size = vocab_size
        self.padded_vocab_size = padded_vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.windows = list(windows)
        self.value_embeds = value_embeds
        self.residual_scalars = residual_scalars
        self.smear = smear
        self.backout = backout
        self.qk_scale = qk_scale
        self.softcap = softcap
        self.rope_base = rope_base
        self.norm_eps = norm_eps
        rest["tie_word_embeddings"] = False
        super().__init__(**rest)

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    def has_value_embedding(self, layer):
        return layer % 2 == (self.num_hidden_layers - 1) % 2
