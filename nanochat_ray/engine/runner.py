"""One forward of the model for one plan of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.cuda_graphs import DecodeGraphs
from nanochat_ray.engine.kernels import native
from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE
from nanochat_ray.engine.kvcache.memory import check_slots, make_allocator
from nanochat_ray.engine.kvcache.paged_cache import PagedCache
from nanochat_ray.engine.kvcache.prefixes import CopiedPrefixes, SharedPrefixes
from nanochat_ray.engine.kvcache.slot_cache import SlotCache
from nanochat_ray.engine.model import InferenceModel
from nanochat_ray.engine.native import Native
from nanochat_ray.engine.sampler import insert
from nanochat_ray.engine.scheduler import Chunk, Sequence
from nanochat_ray.machine import free_memory, send, use_triton
from nanochat_ray.model.gpt import GPT
from nanochat_ray.model.precision import DTYPES


class Runner:
    """Holds the inference model and its cache."""

    def __init__(self, model: GPT, config: EngineConfig, max_model_len: int):
        dtype = DTYPES[config.precision]
        self.device = model.wte.weight.device
        on_cpu, sizes = self.device.type == "cpu", model.config
        self.native: Native | None = None
        if on_cpu and dtype == torch.float32 and config.kernels != "torch":
            group = sizes.n_head // sizes.n_kv_head
            self.native = native(sizes.head_dim, group, config.kernels)
        self.kernels = "triton" if use_triton(self.device) else "torch"
        """What computes: the instructions that the C kernels were compiled for, triton or torch."""
        if self.native is not None:
            self.kernels = self.native.level
        self.model = InferenceModel(
            model.config,
            model.state_dict(),
            max_model_len=max_model_len,
            dtype=dtype,
            device=self.device,
            native=self.native,
        )
        self.min_rows = self.model.min_num_tokens
        self.blocks: BlockAllocator | None = None
        """Where the layout is paged: the accounting of its memory."""
        self.cache: SlotCache | PagedCache
        self._graphs: DecodeGraphs | None = None
        free, place = free_memory(self.device), (dtype, self.device, self.min_rows)
        if not self._paged(config):
            check_slots(model.config, config, max_model_len, dtype, free, self.native is not None)
            slots = config.max_num_seqs
            self.cache = SlotCache(model.config, slots, max_model_len, *place, self.native)
            return
        size = BLOCK_SIZE
        self.blocks = make_allocator(model.config, config, max_model_len, dtype, free, size)
        self.cache = PagedCache(
            model.config, self.blocks, config.max_num_seqs, max_model_len, *place
        )
        if self.device.type == "cuda":
            rows = config.max_num_seqs * (1 + config.num_speculative_tokens)
            if config.speculative_disable_by_batch_size:
                rows = min(rows, max(config.max_num_seqs, config.speculative_disable_by_batch_size))
            self._graphs = DecodeGraphs(self.model, self.cache, rows)

    def _paged(self, config: EngineConfig) -> bool:
        on_gpu = self.device.type == "cuda"
        return on_gpu if config.kv_layout == "auto" else config.kv_layout == "paged"

    def prefixes(self, tokens: int) -> CopiedPrefixes | SharedPrefixes | None:
        """What keeps the beginnings of prompts; ``tokens`` is how many, where they are copies."""
        if tokens < BLOCK_SIZE:
            return None
        if self.blocks is not None:
            return SharedPrefixes(self.blocks)
        assert isinstance(self.cache, SlotCache)
        return CopiedPrefixes(self.cache, tokens)

    def assign(self, sequence: Sequence) -> None:
        """Tells the cache which blocks a running sequence holds."""
        assert isinstance(self.cache, PagedCache)
        self.cache.set_block_tables(sequence.slot, sequence.blocks)

    @torch.inference_mode()
    def run(self, chunks: SequenceOf[Chunk], flown: Tensor | None = None) -> Tensor:
        """float32 logits ``[R, V]`` after those rows of each chunk that it wants (its last
        ``Chunk.rows``), chunk by chunk.

        ``flown`` int64 ``[S]`` holds, on the device, the tokens that the step before chose: those
        of sequences that are ``late``.
        """
        ids: list[int] = []
        before: list[int] = []
        spans: list[Span] = []
        last: list[int] = []
        unknown: list[tuple[int, int]] = []
        for chunk in chunks:
            tokens, slot, start = chunk.sequence.tokens, chunk.sequence.slot, chunk.start
            before.append(tokens[start - 1] if start else -1)
            if chunk.sequence.late >= 0:
                unknown.append((len(ids), chunk.sequence.late))
            if chunk.count == 1 and not chunk.draft:
                spans.append(Span(slot, start, 1, chunk.decode))
                ids.append(tokens[start])
            else:
                run = tokens[start : start + chunk.count] + list(chunk.draft)
                ids += run
                before += run[:-1]
                if chunk.decode:  # each row by itself, as one by one
                    spans += [Span(slot, start + i, 1, True) for i in range(len(run))]
                else:
                    spans.append(Span(slot, start, chunk.count, False))
            last += range(len(ids) - chunk.rows, len(ids))
        graphs = self._graphs if all(chunk.decode for chunk in chunks) else None
        recorded = graphs.rows(len(ids)) if graphs else 0
        rows = recorded or self.cache.prepare(spans)
        table = np.zeros((2, rows), dtype=np.int64)
        table[0, : len(ids)], table[1, : len(ids)] = ids, before
        tokens_2N = send(torch.from_numpy(table), self.device)
        if flown is not None and unknown:
            insert(tokens_2N[0], unknown, flown)
        if graphs and recorded:
            logits = graphs.run(tokens_2N, spans)
            return logits[: len(ids)] if len(last) == len(ids) else logits[self._at(last)]
        ids_N, before_N = tokens_2N
        hidden = self.model.hidden(ids_N, before_N, self.cache)
        if not last:
            return hidden.new_empty((0, self.model.config.vocab_size), dtype=torch.float32)
        if last != list(range(rows)):
            hidden = hidden[self._at(last + [last[0]] * (self.min_rows - len(last)))]
        return self.model.logits(hidden)[: len(last)]

    def _at(self, rows: list[int]) -> Tensor:
        return send(torch.tensor(rows, dtype=torch.int64), self.device)
