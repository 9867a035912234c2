"""Defaults that users rely on, and each field up to its bounds."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from nanochat_ray.engine.config import GPU_DEFAULTS, EngineConfig


def test_defaults_are_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NANOCHAT_KERNELS", raising=False)
    defaults: dict[str, Any] = {
        "max_num_seqs": 32, "max_model_len": 0, "max_num_batched_tokens": 256,
        "prefill_chunk": 64, "prefix_cache_tokens": None, "kv_layout": "auto", "kernels": "auto",
        "kv_cache_memory_fraction": 0.8, "gpu_memory_share": 1.0, "kv_tokens": 0,
        "max_queue_size": 256, "max_queue_s": 30.0, "async_scheduling": "auto",
        "precision": "fp32", "kv_precision": "auto", "batch_invariant": False,
        "num_speculative_tokens": 3, "speculative_disable_by_batch_size": 4,
        "prompt_lookup_max": 2,
    }  # fmt: skip
    assert dataclasses.asdict(EngineConfig()).items() >= defaults.items()
    gpu = dataclasses.asdict(EngineConfig(**GPU_DEFAULTS))  # type: ignore[arg-type]
    assert (gpu["precision"], gpu["max_num_seqs"]) == ("bf16", 256)
    assert (gpu["max_num_batched_tokens"], gpu["prefill_chunk"]) == (8192, 512)
    monkeypatch.setenv("NANOCHAT_KERNELS", "generic")
    assert EngineConfig().kernels == "generic"


COUNT = ([1, 2, 32], [0, -1, 1.0, True, "1"])
SIZE = ([0, 1, 10**6], [-1, 1.0, True])
SHARE = ([1e-9, 0.5, 1], [0, -0.1, 1.001, math.nan, "1"])


@pytest.mark.parametrize(
    ("field", "values", "others"),
    [
        *((name, *COUNT) for name in ("prompt_lookup_max", "prefill_chunk", "max_queue_size")),
        ("max_num_seqs", [1, 255], [0, -1, 256, True, 1.0]),  # fewer than tokens of a step
        ("max_num_batched_tokens", [33, 10**6], [32, 0, 33.0]),
        *((name, *SIZE) for name in ("max_model_len", "kv_tokens", "num_speculative_tokens")),
        ("speculative_disable_by_batch_size", *SIZE),
        ("prefix_cache_tokens", [None, 0, 1], [-1, 1.0, True]),
        ("max_queue_s", [0, 0.5, 1e9], [-1e-9, math.nan, math.inf, "1"]),
        ("kv_cache_memory_fraction", *SHARE),
        ("gpu_memory_share", *SHARE),
        ("kv_layout", ["auto", "slots", "paged"], ["", "blocks", None]),
        ("async_scheduling", ["auto", "on", "off"], ["", True, "yes"]),
        ("kernels", ["auto", "torch", "generic", "avx2", "amx"], ["", "sse", None]),
        ("precision", ["fp32", "bf16", "int8"], ["", "fp16", "float32"]),
        ("kv_precision", ["auto", "fp8"], ["", "int4"]),
    ],
)
def test_fields_to_their_bounds(field: str, values: list[Any], others: list[Any]) -> None:
    for value in values:
        assert getattr(EngineConfig(**{field: value}), field) == value
    for value in others:
        # A batch that is too large for a step is named by the tokens of the step.
        name = "max_num_batched_tokens" if (field, value) == ("max_num_seqs", 256) else field
        with pytest.raises(ValueError, match=f"^{name}="):
            EngineConfig(**{field: value})
