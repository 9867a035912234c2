"""How many keys and values there is memory for, before any of it is taken."""

from __future__ import annotations

import torch

from nanochat_ray.config import EngineConfig, ModelConfig
from nanochat_ray.engine.blocks import BlockPool, Blocks
from nanochat_ray.engine.kv_cache import slot_length
from nanochat_ray.scaling import windows

GIB = 1 << 30


def layer_windows(config: ModelConfig, max_len: int) -> list[int]:
    """For each layer, how many earlier tokens one sees among ``max_len``; -1 is all of them."""
    return [window if window < max_len - 1 else -1 for window in windows(config)]


def token_bytes(config: ModelConfig, dtype: torch.dtype, layers: int) -> int:
    """Keys and values of one token in so many layers."""
    return 2 * layers * config.n_kv_head * config.head_dim * dtype.itemsize


def check_slots(
    model: ModelConfig,
    config: EngineConfig,
    max_len: int,
    dtype: torch.dtype,
    free: int,
    native: bool = False,
) -> None:
    """ValueError if the slots and the kept beginnings do not fit into the free memory."""
    each = token_bytes(model, dtype, model.n_layer)
    slot = slot_length(max_len, native)
    needed = (config.max_slots * slot + config.prefix_tokens) * each
    if needed <= config.kv_memory * free:
        return
    most = int(config.kv_memory * free / each - config.prefix_tokens) // slot
    raise ValueError(
        f"max_slots={config.max_slots} is not allowed: with max_len={max_len} and "
        f"prefix_tokens={config.prefix_tokens}, keys and values take {needed / GIB:.1f} GiB, and "
        f"kv_memory={config.kv_memory} of the free {free / GIB:.1f} GiB holds "
        f"max_slots={max(0, most)} at most"
    )


def make_blocks(
    model: ModelConfig,
    config: EngineConfig,
    max_len: int,
    dtype: torch.dtype,
    free: int,
    block: int,
) -> Blocks:
    """One pool for all layers with the same window, each so large that they run out together if
    all sequences are as long as may be. ValueError if not even one such sequence fits."""
    found = layer_windows(model, max_len)
    pools = [BlockPool(0, window) for window in sorted(set(found))]
    blocks = Blocks(pools, block, config.token_budget)
    needs = [blocks.need(pool, max_len) for pool in pools]
    sizes = [block * token_bytes(model, dtype, found.count(pool.window)) for pool in pools]
    one = sum(need * size for need, size in zip(needs, sizes, strict=True))
    sequences = config.max_slots + config.prefix_tokens / max_len
    if config.kv_tokens:
        sequences = min(sequences, config.kv_tokens / max_len)
    if sequences < 1:
        raise ValueError(
            f"kv_tokens={config.kv_tokens} is not allowed: at least max_len={max_len}, so that "
            "one sequence fits"
        )
    if one > config.kv_memory * free:
        raise ValueError(
            f"max_len={max_len} is not allowed: keys and values of one such sequence take "
            f"{one / GIB:.1f} GiB, more than kv_memory={config.kv_memory} of the free "
            f"{free / GIB:.1f} GiB"
        )
    sequences = min(sequences, config.kv_memory * free / one)
    return Blocks(
        [
            BlockPool(int(sequences * need), pool.window)
            for need, pool in zip(needs, pools, strict=True)
        ],
        block,
        config.token_budget,
    )
