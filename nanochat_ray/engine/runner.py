"""One forward of the model for one plan of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.checks import require
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.kernels import load_kernels
from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.kvcache.build import build_kv_cache, check_kv_cache, choose_layout
from nanochat_ray.engine.model import InferenceModel
from nanochat_ray.engine.native import Native
from nanochat_ray.engine.precision import WEIGHT_DTYPES, activation_dtype, kv_dtype
from nanochat_ray.engine.sampler import insert
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.sequence import PLACEHOLDER
from nanochat_ray.machine import send, use_triton
from nanochat_ray.model.gpt import GPT


class StepInputs:
    """The flat tokens of a step, chunk by chunk."""

    def __init__(self, chunks: SequenceOf[ScheduledChunk]):
        self.token_ids: list[int] = []
        self.previous_ids: list[int] = []
        """The token before each, of the same sequence; -1 where there is none."""
        self.spans: list[Span] = []
        self.logits_indices: list[int] = []
        """Tokens whose logits are needed."""
        self.placeholders: list[tuple[int, int]] = []
        """Index of a token that the previous step samples, and its row there."""
        for chunk in chunks:
            self._add(chunk)
            num_tokens = len(self.token_ids)
            self.logits_indices += range(num_tokens - chunk.num_logits, num_tokens)

    def _add(self, chunk: ScheduledChunk) -> None:
        tokens, slot, start = chunk.sequence.tokens, chunk.sequence.slot, chunk.start
        self.previous_ids.append(tokens[start - 1] if start else -1)
        if chunk.input_from_previous_step is not None:
            self.placeholders.append((len(self.token_ids), chunk.input_from_previous_step))
            self.token_ids.append(PLACEHOLDER)
            self.spans.append(Span(slot, start, 1, chunk.is_decode))
        elif chunk.num_tokens == 1 and not chunk.draft:
            self.token_ids.append(tokens[start])
            self.spans.append(Span(slot, start, 1, chunk.is_decode))
        else:
            ids = [*tokens[start : chunk.end], *chunk.draft]
            self.token_ids += ids
            self.previous_ids += ids[:-1]
            if chunk.is_decode:
                self.spans += [Span(slot, start + i, 1, True) for i in range(len(ids))]
            else:
                self.spans.append(Span(slot, start, chunk.num_tokens, False))


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
        cache_dtype = dtype
        if choose_layout(config, self.device) == "slots":
            cache_dtype = kv_dtype(weight_dtype, self.native is not None)
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
        self._graphs = self.cache.decode_graphs(self.model, max_decodes)
        self._plan = self.cache.step_plan(self.model)

    @torch.inference_mode()
    def run(
        self, chunks: SequenceOf[ScheduledChunk], previous_step_ids: Tensor | None = None
    ) -> Tensor:
        """float32 logits ``[R, V]`` of the last ``num_logits`` tokens of each chunk, in order.

        ``previous_step_ids`` int64 ``[S]`` holds, on the device, the tokens that the previous step
        sampled, if chunks have ``input_from_previous_step``.
        """
        step = StepInputs(chunks)
        count, indices = len(step.token_ids), step.logits_indices
        graphs = self._graphs if all(chunk.is_decode for chunk in chunks) else None
        graph_size = graphs.padded_size(count) if graphs else 0
        num_tokens = graph_size or self.cache.prepare(step.spans)
        table = np.zeros((2, num_tokens), dtype=np.int64)
        table[0, :count], table[1, :count] = step.token_ids, step.previous_ids
        tokens_2N = send(torch.from_numpy(table), self.device)
        if previous_step_ids is not None and step.placeholders:
            insert(tokens_2N[0], step.placeholders, previous_step_ids)
        if graphs and graph_size:
            logits = graphs.run(tokens_2N, step.spans)
            return logits[:count] if len(indices) == count else logits[self._index(indices)]
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
