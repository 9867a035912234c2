"""One forward of the model for one plan of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.checks import require
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.cuda_graphs import GraphLimits, StepResult
from nanochat_ray.engine.duplicates import find_sources
from nanochat_ray.engine.kernels import load_kernels
from nanochat_ray.engine.kvcache.build import build_kv_cache, check_kv_cache, choose_layout
from nanochat_ray.engine.kvcache.slot_cache import SlotCache
from nanochat_ray.engine.model import InferenceModel
from nanochat_ray.engine.native import Native
from nanochat_ray.engine.precision import WEIGHT_DTYPES, activation_dtype, kv_dtype
from nanochat_ray.engine.sampler import insert
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.step_inputs import StepInputs
from nanochat_ray.machine import send, use_triton
from nanochat_ray.model.gpt import GPT


class Runner:
    """Holds the inference model and its cache."""

    def __init__(
        self,
        model: GPT,
        config: EngineConfig,
        max_model_len: int,
        device: torch.device | str | None = None,
    ):
        """``device`` is by default the model's, whose weights are copied."""
        # An empty tensor's device has an index, as those of weights and keys.
        self.device = torch.empty(0, device=device or model.wte.weight.device).device
        on_cpu, sizes = self.device.type == "cpu", model.config
        is_supported = on_cpu or config.precision != "int8"
        require(is_supported, "precision", config.precision, f"fp32 or bf16 on {self.device}")
        self.native: Native | None = None
        if on_cpu and config.kernels != "torch":
            group = sizes.n_head // sizes.n_kv_head
            self.native = load_kernels(sizes.head_dim, group, config.kernels)
        self.kernels = "triton" if use_triton(self.device) else "torch"
        """What computes: the instructions that the C kernels were compiled for, triton or torch."""
        if self.native is not None:
            self.kernels = self.native.level
        weight_dtype = WEIGHT_DTYPES[config.precision]
        dtype = activation_dtype(weight_dtype, self.native is not None)
        cache_dtype = self._cache_dtype(config, dtype)
        check_kv_cache(
            model.config, config, max_model_len, cache_dtype, self.device, self.native is not None
        )
        self.model = InferenceModel(
            model.config,
            model.state_dict(),
            max_model_len=max_model_len,
            dtype=dtype,
            weight_dtype=weight_dtype,
            device=self.device,
            native=self.native,
            is_batch_invariant=config.batch_invariant,
        )
        self.min_num_tokens = self.model.min_num_tokens
        self.cache, self.kv_manager = build_kv_cache(
            model.config,
            config,
            max_model_len,
            cache_dtype,
            self.device,
            self.min_num_tokens,
            self.native,
        )
        max_decodes = config.max_num_seqs * (1 + config.num_speculative_tokens)
        if limit := config.speculative_disable_by_batch_size:
            max_decodes = min(max_decodes, max(config.max_num_seqs, limit))
        limits = GraphLimits(max_decodes, config.max_num_seqs, config.max_num_batched_tokens)
        self.graphs = self.cache.step_graphs(self.model, limits)
        """None where there can be no CUDA graphs."""
        self._plan = self.cache.step_plan(self.model)

    def _cache_dtype(self, config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
        """Of keys and values, where activations have ``dtype``."""
        layout = choose_layout(config, self.device)
        if config.kv_precision == "fp8":
            is_paged = layout == "paged"
            require(is_paged, "kv_precision", "fp8", "auto, or fp8 with the paged layout of a GPU")
            return torch.float8_e4m3fn
        if layout == "slots":
            return kv_dtype(WEIGHT_DTYPES[config.precision], self.native is not None)
        return dtype

    @torch.inference_mode()
    def run(
        self, chunks: SequenceOf[ScheduledChunk], previous_step_ids: Tensor | None = None
    ) -> StepResult:
        """Logits of the last ``num_logits`` tokens of each chunk, in order.

        ``previous_step_ids`` int64 ``[S]`` holds, on the device, the tokens that the previous step
        sampled, if chunks have ``input_from_previous_step``.
        """
        # A plan computes in C, so that equal tokens have equal bits.
        if self._plan is not None and (sources := find_sources(chunks)) is not None:
            return StepResult(self._run_distinct(chunks, sources, previous_step_ids))
        step = StepInputs(chunks)
        if self.graphs is not None and (result := self.graphs.run(step, previous_step_ids)):
            return result
        return StepResult(self._run_eagerly(step, previous_step_ids))

    def _run_distinct(
        self,
        chunks: SequenceOf[ScheduledChunk],
        sources: SequenceOf[int],
        previous_step_ids: Tensor | None,
    ) -> Tensor:
        """Computes each chunk that is its own source, and copies its keys, values and logits for
        those whose source it is (``find_sources``)."""
        assert isinstance(self.cache, SlotCache)
        distinct = [i for i, source in enumerate(sources) if source == i]
        logits = self._run_eagerly(StepInputs([chunks[i] for i in distinct]), previous_step_ids)
        first_row, num_rows = {}, 0
        for i in distinct:
            first_row[i], num_rows = num_rows, num_rows + chunks[i].num_logits
        copies = [
            (chunks[source].sequence.slot, c.sequence.slot, position)
            for i, (c, source) in enumerate(zip(chunks, sources, strict=True))
            if source != i
            for position in range(c.start, c.end)
        ]
        self.cache.copy_tokens(np.array(copies, dtype=np.int64))
        rows = [
            first_row[source] + row
            for c, source in zip(chunks, sources, strict=True)
            for row in range(c.num_logits)
        ]
        return logits[torch.tensor(rows, dtype=torch.int64)]

    def _run_eagerly(self, step: StepInputs, previous_step_ids: Tensor | None) -> Tensor:
        count, indices = len(step.token_ids), step.logits_indices
        num_tokens = self.cache.prepare(step.spans_S4)
        table = np.zeros((2, num_tokens), dtype=np.int64)
        table[0, :count], table[1, :count] = step.token_ids, step.previous_ids
        tokens_2N = send(torch.from_numpy(table), self.device)
        if previous_step_ids is not None and step.has_placeholders:
            insert(tokens_2N[0], step.placeholders, previous_step_ids)
        if self._plan is not None:
            return self._plan.run(table, indices)
        ids_N, previous_N = tokens_2N
        states_NC = self.model.hidden(ids_N, previous_N, self.cache)
        if not indices:
            return states_NC.new_empty((0, self.model.config.vocab_size), dtype=torch.float32)
        if indices != list(range(num_tokens)):
            padding = [indices[0]] * (self.min_num_tokens - len(indices))
            states_NC = states_NC[self._index(indices + padding)]
        return self.model.logits(states_NC)[: len(indices)]

    def _index(self, rows: list[int]) -> Tensor:
        return send(torch.tensor(rows, dtype=torch.int64), self.device)
