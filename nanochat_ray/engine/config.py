"""The configuration of one inference engine."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal, get_args

from nanochat_ray.checks import check_float, check_int, require

KvLayout = Literal["auto", "slots", "paged"]
AsyncScheduling = Literal["auto", "on", "off"]
Kernels = Literal["auto", "amx", "avx512_bf16", "avx512", "avx_vnni", "avx2", "generic", "torch"]
KvPrecision = Literal["auto", "fp8"]
EnginePrecision = Literal["fp32", "bf16", "int8"]


def _default_kernels() -> Kernels:
    """Checked with the other fields."""
    return os.environ.get("NANOCHAT_KERNELS") or "auto"  # type: ignore[return-value]


GPU_DEFAULTS = {
    "precision": "bf16",
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "prefill_chunk": 512,
}
"""What ``serve`` takes in place of ``EngineConfig``'s defaults on a GPU, whose matmuls wait for the
weights up to hundreds of tokens. Not measured yet."""

GUEST_DEFAULTS = {
    "cpu": {"max_num_seqs": 16, "max_num_batched_tokens": 48},
    "cuda": {"max_num_seqs": 32, "max_num_batched_tokens": 96},
}
"""Of an engine that runs in the time that the users of another one leave. Their first tokens wait
for a step of it, so that it must be short: on a CPU one of 16 sequences takes about half the time
of one of 32."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Memory and scheduling of one inference engine."""

    max_num_seqs: int = 32
    """Sequences that are decoded together; ``serve`` takes 256 on a GPU."""
    max_model_len: int = 0
    """Longest prompt and output together, in tokens; 0: the model's sequence_len."""
    max_num_batched_tokens: int = 256
    """Tokens of one step: decodes first, the rest for prompts; ``serve`` takes 8,192 on a GPU."""
    prefill_chunk: int = 64
    """Prompt tokens of a step beside decodes: this many for each prompt, all of a prompt of up
    to three times as many, or 3 for each decode if that is more; fewer late in long prompts. It
    bounds the delay of the decodes; ``serve`` takes 512 on a GPU."""
    prefix_cache_tokens: int | None = None
    """Tokens of prefixes that are cached beside the running sequences, so that a conversation's
    next turn computes only its new tokens; 0: no prefix cache; None: half of the memory for keys
    and values, up to 16 times what all running sequences can have. Running sequences come first.
    With the paged layout all free blocks serve as cache too."""
    kv_layout: KvLayout = "auto"
    """How keys and values are stored: in slots of ``max_model_len`` tokens, or in blocks that are
    allocated as sequences grow. "auto" is "paged" on a GPU and "slots" on a CPU."""
    kernels: Kernels = field(default_factory=_default_kernels)
    """On a CPU everything is in C, compiled for this processor where there is a compiler.
    "auto" uses all that the processor has; "amx", "avx512_bf16", "avx512", "avx_vnni", "avx2" or
    "generic" only that, and "torch" no C. ``NANOCHAT_KERNELS`` is the default where the
    configuration is made."""
    kv_cache_memory_fraction: float = 0.8
    """Share of the free memory that keys and values may take, at most. On a CPU they take what
    their tokens need, as sequences grow."""
    gpu_memory_share: float = 1.0
    """Share of a GPU's memory for this engine, weights included. Engines with a fraction of a GPU
    get that fraction of its memory, whichever starts first."""
    kv_tokens: int = 0
    """Tokens of all sequences together, with the paged layout; 0: as many as they need at most, if
    ``kv_cache_memory_fraction`` allows it."""
    max_queue_size: int = 256
    """Requests that may wait for a slot; further ones are rejected."""
    max_queue_s: float = 30.0
    """Seconds for which a request may have to wait for a slot, as estimated from the speed of the
    engine; one that would wait longer is rejected at once, and one that has waited for 1.1 times
    as long then. 0: no limit but max_queue_size."""
    background_share: float = 0.25
    """Share of the time, at most, that background jobs such as rollouts have while requests are
    decoded; 0: none. They never run while a prompt waits."""
    async_scheduling: AsyncScheduling = "auto"
    """Whether a step is planned and launched while the previous one runs. "auto": on a GPU. On a
    CPU, where a step is done when it is launched, tokens would only come a step later. Not while
    there are draft tokens, which depend on the latest tokens."""
    precision: EnginePrecision = "fp32"
    """Precision of the weights. On a CPU "bf16" rounds weights and the inputs of matmuls, and
    "int8" quantizes them in blocks of 32 with one scale each (llama.cpp's Q8_0); with both, keys
    and values in slots are bf16, and all else is fp32.
    On a GPU activations, keys and values are bf16 too, and there is no int8."""
    kv_precision: KvPrecision = "auto"
    """Precision of keys and values. "auto" follows ``precision``; "fp8" (e4m3, on a GPU) takes half
    of the memory of bf16, and half of the time in which a decode reads them: each is rounded by up
    to 1/16 of its size."""
    batch_invariant: bool = False
    """On a GPU: matmuls by a kernel that sums in one order whatever the batch, so that a request
    has the same logits, bit by bit, alone and among others; slower than cuBLAS, which does not. On
    a CPU it is always so."""
    num_speculative_tokens: int = 3
    """Draft tokens of a sequence in one step, at most; 0: no speculative decoding. It changes no
    token."""
    speculative_disable_by_batch_size: int = 4
    """Draft tokens are added only while the batch has fewer tokens than this; 0: no limit. Matmuls
    of 4 rows take as long as those of 1, since they wait for the weights."""
    prompt_lookup_max: int = 2
    """Length of the n-grams of the lookup: the last tokens must have occurred before."""

    def __post_init__(self) -> None:
        for name in (
            "prompt_lookup_max",
            "max_num_seqs",
            "max_num_batched_tokens",
            "prefill_chunk",
            "max_queue_size",
        ):
            check_int(name, getattr(self, name), 1)
        for name in (
            "max_model_len",
            "kv_tokens",
            "num_speculative_tokens",
            "speculative_disable_by_batch_size",
        ):
            check_int(name, getattr(self, name), 0)
        if self.prefix_cache_tokens is not None:
            check_int("prefix_cache_tokens", self.prefix_cache_tokens, 0)
        check_float("max_queue_s", self.max_queue_s)
        check_float("background_share", self.background_share, 0, 0.9)
        require(
            self.max_num_batched_tokens > self.max_num_seqs,
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            f"more than max_num_seqs={self.max_num_seqs}, or prompts would starve",
        )
        for name, kinds in (
            ("kv_layout", get_args(KvLayout)),
            ("async_scheduling", get_args(AsyncScheduling)),
            ("kernels", get_args(Kernels)),
            ("precision", get_args(EnginePrecision)),
            ("kv_precision", get_args(KvPrecision)),
        ):
            require(getattr(self, name) in kinds, name, getattr(self, name), " or ".join(kinds))
        for name in ("kv_cache_memory_fraction", "gpu_memory_share"):
            check_float(name, getattr(self, name), 0, 1, above=True)
