"""How many keys and values there is memory for, before any of it is taken."""

from __future__ import annotations

import torch

from nanochat_ray.config import EngineConfig, ModelConfig
from nanochat_ray.engine.blocks import BlockPool, Blocks
from nanochat_ray.engine.kv_cache import slot_length
from nanochat_ray.scaling import windows

GIB = 1 << 30


def layer_windows(config: ModelConfig, max_model_len: int) -> list[int]:
    """The window of each layer, in earlier tokens; -1 where it covers ``max_model_len``."""
    return [window if window < max_model_len - 1 else -1 for window in windows(config)]


def token_bytes(config: ModelConfig, dtype: torch.dtype, layers: int) -> int:
    """Keys and values of one token in so many layers."""
    return 2 * layers * config.n_kv_head * config.head_dim * dtype.itemsize


def check_slots(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    dtype: torch.dtype,
    free: int,
    native: bool = False,
) -> None:
    """ValueError if the slots and the kept beginnings do not fit into the free memory."""
    each = token_bytes(model, dtype, model.n_layer)
    slot = slot_length(max_model_len, native)
    needed = (config.max_num_seqs * slot + config.prefix_cache_tokens) * each
    if needed <= config.kv_cache_memory_fraction * free:
        return
    most = int(config.kv_cache_memory_fraction * free / each - config.prefix_cache_tokens) // slot
    raise ValueError(
        f"max_num_seqs={config.max_num_seqs} is not allowed: with "
        f"max_model_len={max_model_len} and prefix_cache_tokens={config.prefix_cache_tokens}, "
        f"keys and values take {needed / GIB:.1f} GiB, and kv_cache_memory_fraction="
        f"{config.kv_cache_memory_fraction} of the free {free / GIB:.1f} GiB holds "
        f"max_num_seqs={max(0, most)} at most"
    )


def make_blocks(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    dtype: torch.dtype,
    free: int,
    block: int,
) -> Blocks:
    """One pool for all layers with the same window, each so large that they run out together if
    all sequences are as long as may be. ValueError if not even one such sequence fits."""
    found = layer_windows(model, max_model_len)
    pools = [BlockPool(0, window) for window in sorted(set(found))]
    blocks = Blocks(pools, block, config.max_num_batched_tokens)
    needs = [blocks.need(pool, max_model_len) for pool in pools]
    sizes = [block * token_bytes(model, dtype, found.count(pool.window)) for pool in pools]
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
    return Blocks(
        [
            BlockPool(int(sequences * need), pool.window)
            for need, pool in zip(needs, pools, strict=True)
        ],
        block,
        config.max_num_batched_tokens,
    )
