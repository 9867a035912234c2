"""Chooses the layout of the KV cache and allocates it. The only module that knows both layouts."""

from __future__ import annotations

from typing import Literal

import torch

from nanochat_ray import container
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.kvcache.base import KVCacheManager
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE
from nanochat_ray.engine.kvcache.kv_cache import KVCache
from nanochat_ray.engine.kvcache.lazy_memory import page_tokens
from nanochat_ray.engine.kvcache.memory import bytes_per_token, make_allocator, slot_sizes
from nanochat_ray.engine.kvcache.memory_budget import MemoryBudget
from nanochat_ray.engine.kvcache.padding import slot_length
from nanochat_ray.engine.kvcache.paged_cache import PagedCache
from nanochat_ray.engine.kvcache.paged_manager import PagedManager
from nanochat_ray.engine.kvcache.prefix_store import PrefixStore
from nanochat_ray.engine.kvcache.slot_cache import SlotCache
from nanochat_ray.engine.kvcache.slot_manager import SlotManager
from nanochat_ray.engine.kvcache.slot_pages import SlotPages
from nanochat_ray.engine.native import Native
from nanochat_ray.machine import free_memory
from nanochat_ray.model.config import ModelConfig

RESERVE_PARTS = 16
"""A CPU engine takes no more memory when only one of so many parts of the machine's is free. Ray
ends processes when less than 1 / 20 is free."""
PREFIX_RESERVE_PARTS = 4
"""The same for its prefix cache, so that the caches of several engines leave memory for the
sequences of each."""


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
    free = free_memory(device, gpu_share=config.gpu_memory_share)
    if choose_layout(config, device) == "paged":
        make_allocator(model, config, max_model_len, dtype, free)
    else:
        grows = device.type == "cpu"
        slot_sizes(model, config, max_model_len, dtype, free, has_native, grows)


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
    free = free_memory(device, gpu_share=config.gpu_memory_share)
    num_slots = config.max_num_seqs
    caches_prefixes = config.prefix_cache_tokens is None or config.prefix_cache_tokens >= BLOCK_SIZE
    if choose_layout(config, device) == "paged":
        allocator = make_allocator(model, config, max_model_len, dtype, free)
        cache = PagedCache(
            model, allocator, num_slots, max_model_len, dtype, device, min_num_tokens
        )
        return cache, PagedManager(allocator, cache, caches_prefixes)
    grows = device.type == "cpu"
    sizes = slot_sizes(model, config, max_model_len, dtype, free, native is not None, grows)
    slots = SlotCache(
        *(model, num_slots, max_model_len, dtype, device, min_num_tokens, native),
        huge_pages=sizes.huge_pages,
    )
    per_token = bytes_per_token(model, dtype, model.n_layer)
    ask = (lambda: free_memory(device)) if grows else None
    rest, total = free - sizes.limit, container.total_memory()
    budget = MemoryBudget(sizes.limit, min(rest, total // RESERVE_PARTS), ask)
    tokens = page_tokens(model.head_dim * dtype.itemsize, sizes.huge_pages)
    length = slot_length(max_model_len, native is not None)
    pages = SlotPages(num_slots, length, per_token, tokens, budget, slots.release_slot)
    num_blocks = sizes.max_prefix_blocks
    copies = PrefixStore(slots, num_blocks) if num_blocks else None
    prefix_reserve = min((free + rest) // 2, total // PREFIX_RESERVE_PARTS)
    prefixes = MemoryBudget(num_blocks * BLOCK_SIZE * per_token, prefix_reserve, ask)
    has_same_bits = native is not None
    return slots, SlotManager(num_slots, max_model_len, copies, prefixes, pages, has_same_bits)
