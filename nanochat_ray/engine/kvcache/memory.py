"""How many keys and values fit into memory, computed before any is allocated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE, BlockPool
from nanochat_ray.engine.kvcache.padding import slot_length
from nanochat_ray.model.config import ModelConfig, windows

GIB = 1 << 30
PREFIX_SHARE = 0.5
"""Share of the memory for keys and values that cached prefixes may take. Running sequences come
first: prefixes are evicted for them."""
PREFIXES_PER_SEQUENCE = 16
"""Cached prefixes of the maximum length for each sequence that may run, at most."""
HUGE_PAGES_SHARE = 0.5
"""Share of the memory for keys and values up to which all slots are in huge pages. With these a
slot takes all of its memory for its first token; decodes are up to 5% faster (BENCHMARKS.md)."""


def layer_windows(config: ModelConfig, max_model_len: int) -> list[int]:
    """The window of each layer, in earlier tokens; -1 where it covers ``max_model_len``."""
    return [window if window < max_model_len - 1 else -1 for window in windows(config)]


def bytes_per_token(config: ModelConfig, dtype: torch.dtype, num_layers: int) -> int:
    """Bytes of the keys and values of one token in this many layers."""
    return 2 * num_layers * config.n_kv_head * config.head_dim * dtype.itemsize


def max_prefix_tokens(config: EngineConfig, max_model_len: int, limit: int, per_token: int) -> int:
    """Tokens of ``prefix_cache_tokens``; if that is None, what ``PREFIX_SHARE`` of ``limit`` bytes
    holds, up to ``PREFIXES_PER_SEQUENCE``."""
    if config.prefix_cache_tokens is not None:
        return config.prefix_cache_tokens
    most = PREFIXES_PER_SEQUENCE * config.max_num_seqs * max_model_len
    return min(most, int(PREFIX_SHARE * limit) // per_token)


@dataclass(frozen=True)
class SlotSizes:
    """The memory of slots and of their prefix cache."""

    limit: int
    """Bytes of both together, at most."""
    huge_pages: bool
    """Whether slots are in huge pages, so that a slot's memory is committed as a whole."""
    max_prefix_blocks: int


def slot_sizes(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    dtype: torch.dtype,
    free: int,
    native: bool = False,
    grows: bool = True,
) -> SlotSizes:
    """ValueError if one sequence of ``max_model_len`` does not fit into ``free`` bytes; on devices
    whose memory is taken at once (``grows`` is False), if not all slots fit."""
    per_token = bytes_per_token(model, dtype, model.n_layer)
    slot = slot_length(max_model_len, native) * per_token
    limit = int(config.kv_cache_memory_fraction * free)
    all_slots = config.max_num_seqs * slot
    prefix_limit = limit if grows else max(0, limit - all_slots)
    prefix_tokens = max_prefix_tokens(config, max_model_len, prefix_limit, per_token)
    needs = slot if grows else all_slots + prefix_tokens * per_token
    if needs > limit:
        subject = f"max_model_len={max_model_len} is not allowed: keys and values of one sequence"
        if not grows:
            subject = (
                f"max_num_seqs={config.max_num_seqs} is not allowed: with max_model_len="
                f"{max_model_len} and prefix_cache_tokens={prefix_tokens}, keys and values"
            )
        raise ValueError(
            f"{subject} take {needs / GIB:.1f} GiB, more than kv_cache_memory_fraction="
            f"{config.kv_cache_memory_fraction} of the free {free / GIB:.1f} GiB"
        )
    return SlotSizes(limit, all_slots <= HUGE_PAGES_SHARE * limit, prefix_tokens // BLOCK_SIZE)


def make_allocator(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    dtype: torch.dtype,
    free: int,
) -> BlockAllocator:
    """One pool for all layers with the same window, sized so that the pools run out together if
    all sequences have ``max_model_len`` tokens. ValueError if not even one such sequence fits."""
    layers = layer_windows(model, max_model_len)
    pools = [BlockPool(0, window) for window in sorted(set(layers))]
    empty = BlockAllocator(pools, config.max_num_batched_tokens)
    needs = [empty.max_blocks(pool, max_model_len) for pool in pools]
    sizes = [
        BLOCK_SIZE * bytes_per_token(model, dtype, layers.count(pool.window)) for pool in pools
    ]
    one = sum(need * size for need, size in zip(needs, sizes, strict=True))
    limit = int(config.kv_cache_memory_fraction * free)
    per_token = max(1, one // max_model_len)
    prefix_tokens = max_prefix_tokens(config, max_model_len, limit, per_token)
    sequences = config.max_num_seqs + prefix_tokens / max_model_len
    if config.kv_tokens:
        sequences = min(sequences, config.kv_tokens / max_model_len)
    if sequences < 1:
        raise ValueError(
            f"kv_tokens={config.kv_tokens} is not allowed: at least "
            f"max_model_len={max_model_len}, so that one sequence fits"
        )
    if one > limit:
        raise ValueError(
            f"max_model_len={max_model_len} is not allowed: keys and values of one such sequence "
            f"take {one / GIB:.1f} GiB, more than kv_cache_memory_fraction="
            f"{config.kv_cache_memory_fraction} of the free {free / GIB:.1f} GiB"
        )
    sequences = min(sequences, limit / one)
    return BlockAllocator(
        [
            BlockPool(int(sequences * need), pool.window)
            for need, pool in zip(needs, pools, strict=True)
        ],
        config.max_num_batched_tokens,
    )
