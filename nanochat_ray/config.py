"""Every knob of the program, as frozen dataclasses that are checked when they are made.

A configuration is composed, never inherited, and never changed after it was made: to vary one,
call ``dataclasses.replace``. ``to_json`` and ``from_json`` are the form in which a checkpoint
keeps it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from nanochat_ray.checks import require as _require

T = TypeVar("T")

Precision = Literal["fp32", "bf16"]
KvLayout = Literal["auto", "slots", "paged"]
AsyncScheduling = Literal["auto", "on", "off"]
Kernels = Literal["auto", "amx", "avx512", "avx2", "generic", "torch"]
Orthogonalizer = Literal["polar_express", "newton_schulz"]


def _require_finite(config: Any) -> None:
    for name in (f.name for f in dataclasses.fields(config)):
        value = getattr(config, name)
        _require(not isinstance(value, float) or math.isfinite(value), name, value, "a number")


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
    """Positions that training sees, and the length of a full ("L") window."""
    window_pattern: str = "L"
    """One letter a layer, tiled: L = all earlier positions, S = a quarter. The last is always L."""
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
    norm_eps: float | None = None
    """Epsilon of RMSNorm; None is the machine epsilon of the activations' dtype."""
    pad_vocab_to: int = 64
    """Embedding and head tables are padded to a multiple of this many rows."""

    @classmethod
    def modern(cls, **fields: Any) -> Self:
        return cls(**fields)

    @classmethod
    def classic(cls, **fields: Any) -> Self:
        off = dict.fromkeys(("value_embeds", "residual_scalars", "smear", "backout"), False)
        rest = {"qk_scale": 1.0, "rope_base": 10_000.0, "norm_eps": 1e-6, "pad_vocab_to": 1}
        return cls(**{**off, **rest, **fields})

    @classmethod
    def preset(cls, name: str, **fields: Any) -> Self:
        makers = {"modern": cls.modern, "classic": cls.classic}
        _require(name in makers, "preset", name, f"one of {sorted(makers)}")
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
        _require_finite(self)
        for name in ("vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "sequence_len"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number from 1")
        _require(self.pad_vocab_to >= 1, "pad_vocab_to", self.pad_vocab_to, "from 1")
        _require(
            self.n_embd % (2 * self.n_head) == 0,
            "n_embd",
            self.n_embd,
            f"an even multiple of n_head={self.n_head}, since RoPE turns pairs",
        )
        _require(
            self.n_head % self.n_kv_head == 0,
            "n_kv_head",
            self.n_kv_head,
            f"a divisor of n_head={self.n_head}",
        )
        _require(
            bool(self.window_pattern) and set(self.window_pattern) <= {"L", "S"},
            "window_pattern",
            self.window_pattern,
            "letters L and S",
        )
        for name in ("softcap", "residual_decay"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 (off) or more")
        _require(
            not self.residual_decay or self.residual_scalars,
            "residual_decay",
            self.residual_decay,
            "0 without residual_scalars",
        )
        _require(0 <= self.dropout < 1, "dropout", self.dropout, "from 0 to below 1")
        _require(self.rope_base > 0, "rope_base", self.rope_base, "above 0")
        eps = self.norm_eps
        _require(eps is None or eps >= 0, "norm_eps", eps, "0 or more, or none for the dtype's")
        _require(self.rope_factor >= 1, "rope_factor", self.rope_factor, "1 (off) or more")
        start = self.document_start
        _require(-1 <= start < self.vocab_size, "document_start", start, "a token, or -1 for none")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Learning rates and what belongs to them; absolute values, already scaled for the run."""

    matrix_lr: float = 0.02
    """Muon, for every matrix inside a block."""
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    scalar_lr: float = 0.5
    weight_decay: float = 0.0
    """Decay of the matrices, tied to the rate."""
    orthogonalizer: Orthogonalizer = "polar_express"
    """Muon's iteration towards the nearest semi-orthogonal matrix."""
    normuon: bool = True
    """Even out the sizes of a Muon update's neurons by their running second moments."""
    row_normalize: bool = True
    """Give the rows of a gradient equal norms before it is made orthogonal."""
    cautious: bool = False
    """Decay a weight only where that agrees with its update."""
    momentum: float = 0.95
    warmup_ratio: float = 0.02
    """Share of the steps in which the rates rise."""
    embedding_beta2: float = 0.995
    """Decay of the second moment of AdamW for the embeddings."""
    warmdown_ratio: float = 0.8
    """Share of the steps in which the rates fall to ``final_lr_frac``."""
    final_lr_frac: float = 0.05
    """Last rate as a share of the full one."""
    grad_clip: float = 0.0
    """Largest global gradient norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _require_finite(self)
        rates = ("matrix_lr", "embedding_lr", "unembedding_lr", "scalar_lr")
        for name in (*rates, "weight_decay", "grad_clip"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        iterations = ("polar_express", "newton_schulz")
        allowed = f"one of {iterations}"
        _require(self.orthogonalizer in iterations, "orthogonalizer", self.orthogonalizer, allowed)
        for name in ("warmup_ratio", "warmdown_ratio", "final_lr_frac"):
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "from 0 to 1")
        for name in ("momentum", "embedding_beta2"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One stage of training: what is trained, on how much, and when it is looked at."""

    stage: Literal["base", "sft"] = "base"
    steps: int
    global_batch_size: int
    """Rows of the global batch, whatever the number of workers."""
    micro_batch_size: int
    """Rows of one forward and backward pass of one worker."""
    seed: int = 0
    precision: Precision = "fp32"
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    fp8: bool = False
    """The blocks' large matrix products in 8-bit floating point (Hopper; bf16 for the rest)."""
    compile: bool = False
    """Compile the forward pass (torch.compile): pays on a GPU; on a CPU it gained nothing."""
    window_warmup: float = 0.0
    """Share of the steps in which attention windows grow, in three stages, to their full size."""
    eval_every: int = 0
    """Steps between validations; 0 validates only at the first and last step."""
    eval_sequences: int = 256
    """Validation rows that are looked at, at most."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves only at the end."""
    keep_latest_k: int = 2
    """Newest checkpoints that are kept."""
    keep_best: bool = True
    """Also save where a validation is the best so far, and keep that checkpoint."""
    checkpoint_activations: bool = False
    """Keep only the inputs of blocks and compute the rest again in the backward pass (Chen et al.,
    arXiv 1604.06174): a third more work for a fraction of the memory."""
    deterministic: bool = False
    """Only operations whose result is the same bits each time; slower on a GPU."""
    spike_clip: float = 0.0
    """A gradient norm above this many times the median of the last 100 is cut down to that; 0 is
    off."""
    sample_tokens: int = 48
    """Tokens of the texts that are written at each validation, for a person to read; 0 is none."""

    def __post_init__(self) -> None:
        _require_finite(self)
        for name in ("steps", "global_batch_size", "micro_batch_size", "keep_latest_k"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number from 1")
        for name in ("eval_every", "save_every", "eval_sequences", "sample_tokens"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(self.precision in ("fp32", "bf16"), "precision", self.precision, "fp32 or bf16")
        _require(self.stage in ("base", "sft"), "stage", self.stage, "base or sft")
        _require(not self.fp8 or self.precision == "bf16", "fp8", self.fp8, "only in bf16")
        _require(0 <= self.window_warmup <= 1, "window_warmup", self.window_warmup, "from 0 to 1")
        _require(
            self.spike_clip == 0 or self.spike_clip > 1,
            "spike_clip",
            self.spike_clip,
            "0 (off) or more than 1",
        )
        _require(
            self.global_batch_size % self.micro_batch_size == 0,
            "global_batch_size",
            self.global_batch_size,
            f"a multiple of micro_batch_size={self.micro_batch_size}",
        )


def _default_kernels() -> Kernels:
    """Checked with the other fields."""
    return os.environ.get("NANOCHAT_KERNELS") or "auto"  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Memory and scheduling of one inference engine."""

    max_num_seqs: int = 32
    """Sequences that are decoded together."""
    max_model_len: int = 0
    """Longest prompt plus answer, in tokens; 0 is the model's sequence_len."""
    max_num_batched_tokens: int = 256
    """Tokens of one step: decodes first, what is left goes to prompts."""
    prefill_chunk: int = 64
    """Prompt tokens, for each prompt, of a step in which others decode, or 3 for each of these if
    that is more; fewer late in long prompts. It bounds the others' delay."""
    prefix_cache_tokens: int = 4096
    """Tokens of prompt beginnings that are kept for later prompts that begin the same; 0 is off.
    Where the layout is paged, what nobody holds is kept too."""
    kv_layout: KvLayout = "auto"
    """How keys and values are stored: in slots of ``max_model_len`` tokens, or in blocks that are
    allocated as sequences grow. "auto" is "paged" in bf16 on a GPU, and "slots", the fastest on a
    CPU, elsewhere."""
    kernels: Kernels = field(default_factory=_default_kernels)
    """In fp32 on a CPU all but the sampling is in C, compiled for this processor where there is a
    compiler. "auto" uses all that the processor has; "amx", "avx512", "avx2" or "generic" only
    that, and "torch" no C. ``NANOCHAT_KERNELS`` is the default where the configuration is made."""
    kv_cache_memory_fraction: float = 0.8
    """Share of the free memory that keys and values may take, at most."""
    kv_tokens: int = 0
    """Tokens that all sequences together may hold where the layout is paged; 0 is what they need
    at most, if ``kv_cache_memory_fraction`` has room for it."""
    max_queue_size: int = 256
    """Requests that may wait for a slot; one more is refused."""
    async_scheduling: AsyncScheduling = "auto"
    """Whether a step is planned and launched while the one before it runs. "auto" is on a GPU: on a
    CPU, which is done with a step when it is launched, tokens would only come a step later. Not
    while a step has rows left for guesses, which need known tokens."""
    precision: Precision = "fp32"
    num_speculative_tokens: int = 3
    """Guessed tokens that a sequence runs beside its last one, at most; 0 is off. Tokens are the
    same."""
    speculative_disable_by_batch_size: int = 4
    """Guesses fill a step up to so many rows; 0 is no bound. Products of 4 rows take as long as
    those of 1, since they wait for the weights."""
    prompt_lookup_max: int = 2
    """Tokens that must have stood before in this order for a guess at what follows them."""

    def __post_init__(self) -> None:
        _require_finite(self)
        for name in (
            "prompt_lookup_max",
            "max_num_seqs",
            "max_num_batched_tokens",
            "prefill_chunk",
            "max_queue_size",
        ):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number from 1")
        for name in (
            "max_model_len",
            "prefix_cache_tokens",
            "kv_tokens",
            "num_speculative_tokens",
            "speculative_disable_by_batch_size",
        ):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        _require(
            self.max_num_batched_tokens > self.max_num_seqs,
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            f"more than max_num_seqs={self.max_num_seqs}, or prompts would starve",
        )
        _require(self.precision in ("fp32", "bf16"), "precision", self.precision, "fp32 or bf16")
        for name, kinds in (
            ("kv_layout", get_args(KvLayout)),
            ("async_scheduling", get_args(AsyncScheduling)),
            ("kernels", get_args(Kernels)),
        ):
            _require(getattr(self, name) in kinds, name, getattr(self, name), " or ".join(kinds))
        _require(
            0 < self.kv_cache_memory_fraction <= 1,
            "kv_cache_memory_fraction",
            self.kv_cache_memory_fraction,
            "above 0, up to 1",
        )


RENAMED_FIELDS: dict[str, dict[str, str]] = {
    "TrainConfig": {
        "batch_rows": "global_batch_size",
        "micro_rows": "micro_batch_size",
        "eval_rows": "eval_sequences",
        "keep": "keep_latest_k",
    },
    "OptimConfig": {
        "warmup": "warmup_ratio",
        "warmdown": "warmdown_ratio",
        "final_lr": "final_lr_frac",
        "equilibrate": "row_normalize",
    },
    "EngineConfig": {
        "max_slots": "max_num_seqs",
        "max_len": "max_model_len",
        "token_budget": "max_num_batched_tokens",
        "prefix_tokens": "prefix_cache_tokens",
        "kv_memory": "kv_cache_memory_fraction",
        "max_waiting": "max_queue_size",
        "overlap": "async_scheduling",
        "speculative_tokens": "num_speculative_tokens",
        "speculative_rows": "speculative_disable_by_batch_size",
        "speculative_ngram": "prompt_lookup_max",
    },
    "ServeConfig": {
        "engines": "num_replicas",
        "max_engines": "max_replicas",
        "ingresses": "num_ingress_replicas",
        "snapshot": "checkpoint",
    },
    "export": {"take": "import_from"},
}
"""Old name of a field → its name, by configuration. Checkpoints that were written with old names
still load; a flag or option with an old name fails and says the new one."""


def with_new_names(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` of the configuration class ``kind``, with each old field name replaced."""
    table = RENAMED_FIELDS.get(kind, {})
    return {table.get(name, name): value for name, value in values.items()}


def renamed(name: str) -> str | None:
    """The new name of a flag or field, given with ``-`` or ``_``; None if it has not changed."""
    key = name.strip("-").replace("-", "_")
    return next((table[key] for table in RENAMED_FIELDS.values() if key in table), None)


def with_options(config: T, options: Sequence[str]) -> tuple[T, list[str]]:
    """``config`` with the ``name=value`` options that it has fields for, and the other options.

    Values are JSON, or text if they are not. ValueError names an option without "=" or a value
    of another type than the field's.
    """
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    changes: dict[str, Any] = {}
    others: list[str] = []
    for option in options:
        name, equals, text = option.partition("=")
        _require(bool(equals), "option", option, "name=value")
        if name not in fields:
            new = renamed(name)
            _require(new is None, "option", option, f"{name} is now {new}")
            others.append(option)
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text
        old = fields[name]
        if isinstance(old, float) and type(value) is int:
            value = float(value)
        kinds = (float, int, type(None)) if old is None else (type(old),)
        _require(type(value) in kinds, name, value, f"a value like {old!r}")
        changes[name] = value
    return dataclasses.replace(config, **changes), others  # type: ignore[type-var]


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values; nested configurations become nested objects."""
    return dataclasses.asdict(config)


def _typed(kind: Any, name: str, value: Any) -> Any:
    """``value`` as a field of type ``kind`` may hold it; whole floats' ints become floats.

    ValueError names the field. Types that are none of JSON's are left to the dataclass.
    """
    choices = get_args(kind)
    if get_origin(kind) is Literal:
        _require(value in choices, name, shortened(value), f"one of {choices}")
    elif get_origin(kind) is UnionType or kind in (bool, int, float, str):
        kinds = choices or (kind,)
        if float in kinds and type(value) is int and abs(value) < 1 << 53:
            return float(value)
        names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
        _require(type(value) in kinds, name, shortened(value), names)
        sound = math.isfinite(value) if type(value) is float else True
        sound = abs(value) < 1 << 63 if type(value) is int else sound
        _require(sound, name, shortened(value), "a finite number of at most 64 bits")
    return value


def shortened(value: object, limit: int = 60) -> object:
    """``value``, or something with a short repr if its own is longer than ``limit``."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an int of {value.bit_length()} bits"
    text = repr(value)
    return value if len(text) <= limit else text[:limit] + "…"


def from_json(kind: type[T], values: Mapping[str, Any]) -> T:
    """The configuration that ``to_json`` wrote.

    ValueError names a missing or unknown field, or one of the wrong type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{kind.__name__} is {shortened(values)!r}, not an object")
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = with_new_names(kind.__name__, values)
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(
            f"{kind.__name__} has no field {shortened(unknown[0])!r}; it has {sorted(fields)}"
        )
    types = get_type_hints(kind)
    arguments = {
        name: from_json(types[name], value)
        if dataclasses.is_dataclass(types[name])
        else _typed(types[name], name, value)
        for name, value in values.items()
    }
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from None
