"""How many keys and values fit into memory, computed before any is allocated."""

from __future__ import annotations

import torch

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator
from nanochat_ray.engine.kvcache.block_pool import BlockPool
from nanochat_ray.engine.kvcache.padding import slot_length
from nanochat_ray.model.config import ModelConfig, windows

GIB = 1 << 30


def layer_windows(config: ModelConfig, max_model_len: int) -> list[int]:
    """The window of each layer, in earlier tokens; -1 where it covers ``max_model_len``."""
    return [window if window < max_model_len - 1 else -1 for window in windows(config)]


def bytes_per_token(config: ModelConfig, dtype: torch.dtype, num_layers: int) -> int:
    """Bytes of the keys and values of one token in this many layers."""
    return 2 * num_layers * config.n_kv_head * config.head_dim * dtype.itemsize


def check_slots(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    dtype: torch.dtype,
    free: int,
    native: bool = False,
) -> None:
    """ValueError if the slots and the prefix cache do not fit into ``free`` bytes."""
    per_token = bytes_per_token(model, dtype, model.n_layer)
    slot = slot_length(max_model_len, native)
    needs = (config.max_num_seqs * slot + config.prefix_cache_tokens) * per_token
    if needs <= config.kv_cache_memory_fraction * free:
        return
    most = (
        int(config.kv_cache_memory_fraction * free / per_token - config.prefix_cache_tokens) // slot
    )
    raise ValueError(
        f"max_num_seqs={config.max_num_seqs} is not allowed: with "
        f"max_model_len={max_model_len} and prefix_cache_tokens={config.prefix_cache_tokens}, "
        f"keys and values take {needs / GIB:.1f} GiB, and kv_cache_memory_fraction="
        f"{config.kv_cache_memory_fraction} of the free {free / GIB:.1f} GiB holds "
        f"max_num_seqs={max(0, most)} at most"
    )


def make_allocator(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    dtype: torch.dtype,
    free: int,
    block_size: int,
) -> BlockAllocator:
    """One pool for all layers with the same window, sized so that the pools run out together if
    all sequences have ``max_model_len`` tokens. ValueError if not even one such sequence fits."""
    layers = layer_windows(model, max_model_len)
    pools = [BlockPool(0, window) for window in sorted(set(layers))]
    empty = BlockAllocator(pools, block_size, config.max_num_batched_tokens)
    needs = [empty.max_blocks(pool, max_model_len) for pool in pools]
    sizes = [
        block_size * bytes_per_token(model, dtype, layers.count(pool.window)) for pool in pools
    ]
    one = sum(need * size for need, size in zip(needs, sizes, strict=True))
    sequences = config.max_num_seqs + config.prefix_cache_tokens / max_model_len
    if config.kv_tokens:
        sequences = min(sequences, config.kv_tokens / max_model_len)
    if sequences < 1:
        raise ValueError(
            f"kv_tokens={config.kv_tokens} is not allowed: at least "
            f"max_model_len={max_model_len}, so that one sequence fits"
        )
    if one > config.kv_cache_memory_fraction * free:
        raise ValueError(
            f"max_model_len={max_model_len} is not allowed: keys and values of one such sequence "
            f"take {one / GIB:.1f} GiB, more than kv_cache_memory_fraction="
            f"{config.kv_cache_memory_fraction} of the free {free / GIB:.1f} GiB"
        )
    sequences = min(sequences, config.kv_cache_memory_fraction * free / one)
    return BlockAllocator(
        [
            BlockPool(int(sequences * need), pool.window)
            for need, pool in zip(needs, pools, strict=True)
        ],
        block_size,
        config.max_num_batched_tokens,
    )
