"""The shape and the options of a transformer, and what follows from them without torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, Self, get_args

from nanochat_ray.checks import check_int, require
from nanochat_ray.config import require_finite

Precision = Literal["fp32", "bf16"]
"""Of activations; ``model.precision.DTYPES`` has the torch dtype of each."""
Preset = Literal["modern", "classic"]
"""The architectures that ``ModelConfig.preset`` knows."""
GATE_CHANNELS, SMEAR_GATE_CHANNELS = 12, 24
"""Leading channels of the residual stream that gates read (modded-nanogpt, nanochat)."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and features of one transformer.

    ``modern()`` is nanochat of July 2026, ``classic()`` nanochat of October 2025 (the
    architecture of transformers' ``NanoChatForCausalLM``); each field may be set by itself too.
    """

    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    sequence_len: int
    """Positions that training sees."""
    window_pattern: str = "L"
    """One letter a layer, tiled: how many earlier positions it sees. L = ``context_len``, S = a
    quarter of ``sequence_len``. The last is always L."""
    document_start: int = -1
    """Token that begins a document, which attention and smear then do not cross; -1 lets them."""
    value_embeds: bool = True
    """A second embedding table mixed into the values of every other layer (ResFormer)."""
    residual_scalars: bool = True
    """Learned scale of the residual stream, and share of the first embedding, for each layer."""
    smear: bool = True
    """Mix the previous token's embedding into each token's."""
    backout: bool = True
    """Subtract a learned share of the middle layer's residual before the head."""
    skips: bool = False
    """U-Net: a layer of the second half adds a gated share of its mirror image in the first."""
    attention_gate: bool = False
    """Scale each head's output by a gate that looks at a few channels of the layer's input."""
    residual_decay: float = 0.0
    """Start of every residual scale: above 1, the share of earlier layers decays exponentially with
    depth; 0 is nanochat's ramp from 1.15 to 1.05."""
    dropout: float = 0.0
    """Share of the embedding's and of each sublayer's outputs that training zeroes."""
    qk_scale: float = 1.2
    """Factor on normalised queries and on keys (attention is sharpened by its square)."""
    softcap: float = 15.0
    """Logits are softcap * tanh(logits / softcap); 0 turns it off."""
    rope_base: float = 100_000.0
    rope_factor: float = 1.0
    """Serve this many times ``sequence_len`` positions, by YaRN's interpolation of frequencies."""
    norm_eps: float = 2.0**-23
    """Epsilon of RMSNorm, in every precision. The default is float32's machine epsilon, as torch
    takes it for bfloat16 too."""
    pad_vocab_to: int = 64
    """Embedding and head tables are padded to a multiple of this many rows."""

    @classmethod
    def modern(cls, **fields: Any) -> Self:
        return cls(**fields)

    @classmethod
    def classic(cls, **fields: Any) -> Self:
        without = dict.fromkeys(("value_embeds", "residual_scalars", "smear", "backout"), False)
        rest = {"qk_scale": 1.0, "rope_base": 10_000.0, "norm_eps": 1e-6, "pad_vocab_to": 1}
        return cls(**{**without, **rest, **fields})

    @classmethod
    def preset(cls, name: str, **fields: Any) -> Self:
        makers = {"modern": cls.modern, "classic": cls.classic}
        require(name in get_args(Preset), "preset", name, " or ".join(get_args(Preset)))
        return makers[name](**fields)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def context_len(self) -> int:
        """Positions that the model can serve."""
        return int(self.sequence_len * self.rope_factor)

    @property
    def padded_vocab_size(self) -> int:
        return -(-self.vocab_size // self.pad_vocab_to) * self.pad_vocab_to

    def __post_init__(self) -> None:
        require_finite(self)
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "sequence_len"):
            check_int(name, getattr(self, name), 1)
        check_int("pad_vocab_to", self.pad_vocab_to, 1)
        require(
            self.n_embd % (2 * self.n_head) == 0,
            "n_embd",
            self.n_embd,
            f"an even multiple of n_head={self.n_head}, since RoPE turns pairs",
        )
        require(
            self.n_head % self.n_kv_head == 0,
            "n_kv_head",
            self.n_kv_head,
            f"a divisor of n_head={self.n_head}",
        )
        require(
            bool(self.window_pattern) and set(self.window_pattern) <= {"L", "S"},
            "window_pattern",
            self.window_pattern,
            "letters L and S",
        )
        for name in ("softcap", "residual_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 (off) or more")
        require(
            not self.residual_decay or self.residual_scalars,
            "residual_decay",
            self.residual_decay,
            "0 without residual_scalars",
        )
        require(0 <= self.dropout < 1, "dropout", self.dropout, "from 0 to below 1")
        require(self.rope_base > 0, "rope_base", self.rope_base, "above 0")
        require(self.norm_eps >= 0, "norm_eps", self.norm_eps, "0 or more")
        require(self.rope_factor >= 1, "rope_factor", self.rope_factor, "1 (off) or more")
        start = self.document_start
        require(-1 <= start < self.vocab_size, "document_start", start, "a token, or -1 for none")

    def options_beyond(self, options: Collection[str]) -> dict[str, Any]:
        """The fields that are not at their default and not among ``options``, with their values."""
        return {
            f.name: value
            for f in fields(self)
            if f.default is not MISSING
            and f.name not in options
            and (value := getattr(self, f.name)) != f.default
        }


COMMON_OPTIONS = frozenset((
    "window_pattern", "document_start", "value_embeds", "residual_scalars", "smear", "backout",
    "skips", "attention_gate", "residual_decay", "dropout", "qk_scale", "softcap", "norm_eps",
    "rope_base", "rope_factor", "pad_vocab_to",
))  # fmt: skip
"""Options that every forward knows: the training model's, and the engine's in torch, C and Triton.
A new field is not one of them until it is in all."""


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters by what they do. ``scalars`` are all the small ones: factors of the
    residual stream, and the gates of smear, skips and heads."""

    embedding: int
    value_embedding: int
    head: int
    matrices: int
    scalars: int

    @property
    def total(self) -> int:
        return self.embedding + self.value_embedding + self.head + self.matrices + self.scalars


def has_value_embedding(layer: int, n_layer: int) -> bool:
    """Every other layer, the last one always (ResFormer, arXiv 2410.17897; nanochat's choice)."""
    return layer % 2 == (n_layer - 1) % 2


def count_parameters(config: ModelConfig) -> ParameterCounts:
    c, kv = config.n_embd, config.n_kv_head * config.head_dim
    gate = min(GATE_CHANNELS, c)
    with_ve = sum(has_value_embedding(i, config.n_layer) for i in range(config.n_layer))
    with_ve *= config.value_embeds
    block = 2 * c * c + 2 * c * kv + 8 * c * c
    gates = with_ve * gate * config.n_kv_head
    scalars = 2 * config.n_layer * config.residual_scalars
    scalars += (min(SMEAR_GATE_CHANNELS, c) + 1) * config.smear + config.backout
    scalars += config.n_layer // 2 * (gate + 1) * config.skips
    scalars += config.n_layer * gate * config.n_head * config.attention_gate
    return ParameterCounts(
        embedding=config.padded_vocab_size * c,
        value_embedding=with_ve * config.padded_vocab_size * kv,
        head=config.padded_vocab_size * c,
        matrices=config.n_layer * block + gates,
        scalars=scalars,
    )


def windows(config: ModelConfig) -> tuple[int, ...]:
    """For each layer, how many earlier tokens a token sees.

    "L" is the context: over longer sequences attention slides, as nanochat's. "S" is a quarter of
    the training's, rounded up to 128 (nanochat: the tile of FlashAttention 3).
    """
    short = -(-config.sequence_len // 4 // 128) * 128
    letters = [config.window_pattern[i % len(config.window_pattern)] for i in range(config.n_layer)]
    letters[-1] = "L"
    return tuple(short if letter == "S" else config.context_len for letter in letters)


def flops_per_token(config: ModelConfig) -> float:
    """Forward and backward of one token in training (PaLM's count, arXiv 2204.02311)."""
    counts = count_parameters(config)
    spans = [min(window, config.sequence_len) for window in windows(config)]
    return 6.0 * (counts.matrices + counts.head) + 12.0 * config.n_embd * sum(spans)
