"""Chooses the layout of the KV cache and allocates it. The only module that knows both layouts."""

from __future__ import annotations

from typing import Literal

import torch

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.kvcache.base import KVCacheManager
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE
from nanochat_ray.engine.kvcache.kv_cache import KVCache
from nanochat_ray.engine.kvcache.memory import check_slots, make_allocator
from nanochat_ray.engine.kvcache.paged_cache import PagedCache
from nanochat_ray.engine.kvcache.paged_manager import PagedManager
from nanochat_ray.engine.kvcache.prefix_store import PrefixStore
from nanochat_ray.engine.kvcache.slot_cache import SlotCache
from nanochat_ray.engine.kvcache.slot_manager import SlotManager
from nanochat_ray.engine.native import Native
from nanochat_ray.machine import free_memory
from nanochat_ray.model.config import ModelConfig


def choose_layout(config: EngineConfig, device: torch.device) -> Literal["slots", "paged"]:
    if config.kv_layout == "auto":
        return "paged" if device.type == "cuda" else "slots"
    return config.kv_layout


def check_kv_cache(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    has_native: bool,
) -> None:
    """ValueError if the memory does not suffice; before a model is built for such a length."""
    free = free_memory(device)
    if choose_layout(config, device) == "paged":
        make_allocator(model, config, max_model_len, dtype, free, BLOCK_SIZE)
    else:
        check_slots(model, config, max_model_len, dtype, free, has_native)


def build_kv_cache(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    dtype: torch.dtype,
    device: torch.device,
    min_num_tokens: int = 1,
    native: Native | None = None,
) -> tuple[KVCache, KVCacheManager]:
    """The memory and its manager. ``min_num_tokens``: the least number of tokens of a forward;
    ``native`` was compiled for the model's sizes. ValueError if the memory does not suffice."""
    free, num_slots = free_memory(device), config.max_num_seqs
    caches_prefixes = config.prefix_cache_tokens >= BLOCK_SIZE
    if choose_layout(config, device) == "paged":
        allocator = make_allocator(model, config, max_model_len, dtype, free, BLOCK_SIZE)
        cache = PagedCache(
            model, allocator, num_slots, max_model_len, dtype, device, min_num_tokens
        )
        return cache, PagedManager(allocator, cache, caches_prefixes)
    check_slots(model, config, max_model_len, dtype, free, native is not None)
    slots = SlotCache(model, num_slots, max_model_len, dtype, device, min_num_tokens, native)
    if not caches_prefixes:
        return slots, SlotManager(num_slots, max_model_len)
    num_blocks = config.prefix_cache_tokens // BLOCK_SIZE
    copies = PrefixStore(slots, num_blocks)
    return slots, SlotManager(num_slots, max_model_len, num_blocks, copies)
