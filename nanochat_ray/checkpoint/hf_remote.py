"""``config.json`` for the modelling file in ``remote_code``: of a model, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanochat_ray.checkpoint.folder import (
    MAX_LAYERS,
    MAX_POSITIONS,
    MAX_VOCABULARY,
    MAX_WIDTH,
    Fields,
)
from nanochat_ray.checks import short_repr
from nanochat_ray.model.config import ModelConfig, windows

MODEL_TYPE = "nanochat_ray"
_SWITCHES = ("value_embeds", "residual_scalars", "smear", "backout")
_NUMBERS = ("qk_scale", "softcap", "rope_base", "norm_eps")


def architecture(config: ModelConfig) -> dict[str, Any]:
    """What ``config.json`` has beside the fields of transformers' own architecture."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["NanochatRayForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_nanochat_ray.NanochatRayConfig",
            "AutoModelForCausalLM": "modeling_nanochat_ray.NanochatRayForCausalLM",
        },
        **{name: getattr(config, name) for name in (*_SWITCHES, *_NUMBERS)},
        "windows": list(windows(config)),
        "padded_vocab_size": config.padded_vocab_size,
    }


def read(path: Path, values: dict[str, Any]) -> ModelConfig:
    """The model that a ``config.json`` describes. ValueError names the field."""
    fields = Fields(path, values)
    spans = values.get("windows")
    context = fields.int("max_position_embeddings", MAX_POSITIONS)
    pattern = "".join("L" if span == context else "S" for span in _list(spans))
    config = ModelConfig.modern(
        vocab_size=fields.int("vocab_size", MAX_VOCABULARY),
        n_layer=fields.int("num_hidden_layers", MAX_LAYERS),
        n_head=fields.int("num_attention_heads", MAX_WIDTH),
        n_kv_head=fields.int("num_key_value_heads", MAX_WIDTH),
        n_embd=fields.int("hidden_size", MAX_WIDTH),
        sequence_len=context,
        window_pattern=pattern or "L",
        pad_vocab_to=fields.int("padded_vocab_size", MAX_VOCABULARY),
        **{name: fields.switch(name) for name in _SWITCHES},
        **{name: fields.float(name, 1e12) for name in _NUMBERS},
    )
    if spans != list(windows(config)):
        expectation = "the context or a quarter of it for each layer, the context for the last"
        raise ValueError(f"windows={short_repr(spans)} is not allowed: {expectation}")
    fields.equal("padded_vocab_size", config.padded_vocab_size)
    return config


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
