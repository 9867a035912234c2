"""The configuration of one inference engine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, get_args

from nanochat_ray.checks import require
from nanochat_ray.config import require_finite
from nanochat_ray.model.config import Precision

KvLayout = Literal["auto", "slots", "paged"]
AsyncScheduling = Literal["auto", "on", "off"]
Kernels = Literal["auto", "amx", "avx512", "avx2", "generic", "torch"]


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
    allocated as sequences grow. "auto" is "paged" on a GPU and "slots" on a CPU."""
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
        require_finite(self)
        for name in (
            "prompt_lookup_max",
            "max_num_seqs",
            "max_num_batched_tokens",
            "prefill_chunk",
            "max_queue_size",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a whole number from 1")
        for name in (
            "max_model_len",
            "prefix_cache_tokens",
            "kv_tokens",
            "num_speculative_tokens",
            "speculative_disable_by_batch_size",
        ):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(
            self.max_num_batched_tokens > self.max_num_seqs,
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            f"more than max_num_seqs={self.max_num_seqs}, or prompts would starve",
        )
        require(self.precision in ("fp32", "bf16"), "precision", self.precision, "fp32 or bf16")
        for name, kinds in (
            ("kv_layout", get_args(KvLayout)),
            ("async_scheduling", get_args(AsyncScheduling)),
            ("kernels", get_args(Kernels)),
        ):
            require(getattr(self, name) in kinds, name, getattr(self, name), " or ".join(kinds))
        require(
            0 < self.kv_cache_memory_fraction <= 1,
            "kv_cache_memory_fraction",
            self.kv_cache_memory_fraction,
            "above 0, up to 1",
        )
