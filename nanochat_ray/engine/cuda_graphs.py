"""CUDA graphs of steps: recorded once for each size, then replayed.

A graph launches all kernels of a step at once, since a small model on a large GPU would otherwise
wait for Python to launch them one by one. It reads its inputs from one buffer, which one copy
fills, and samples too. Steps of decodes alone have graphs of their own; those with prompts run in a
graph with room for both. Even 8,192 tokens of 12 layers take an H200 4.5 ms, and Python 12 ms to
launch.

Legend: N tokens, R rows of logits, V tokens of the vocabulary.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.engine.kvcache.attention_metadata import AttentionMetadata, MetadataShape
from nanochat_ray.engine.model import AttentionCache, InferenceModel
from nanochat_ray.engine.staging import HostArrays, pack, unpack
from nanochat_ray.engine.step_inputs import StepInputs

DENSE_UP_TO = 256
"""Graphs are 8 tokens apart up to this, since a step of 9 sequences should not cost that of 16."""
MIXED_SIZES = (
    *(*range(64, 512, 64), *range(512, 1024, 128), *range(1024, 2048, 256)),
    *(*range(2048, 4096, 512), *range(4096, 8193, 1024)),
)
"""Tokens of the graphs of steps with prompts: a quarter is padding at most, from 256 on."""
MIXED_PROMPTS = 16
"""Prompts of such a step, at most, or one for each 64 tokens."""

Sampler = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Tokens int64 ``[R]`` of float32 logits ``[R, V]``, by the slots and positions int64 ``[R]``."""


class GraphLimits(NamedTuple):
    """The largest steps that are recorded."""

    max_decodes: int
    """Tokens of a step of decodes alone, draft tokens included."""
    max_num_seqs: int
    max_num_batched_tokens: int


class GraphCache(AttentionCache, Protocol):
    """A KV cache whose steps are described by tensors (``kvcache.paged_cache.PagedCache``)."""

    device: torch.device

    def graph_shape(self, num_tokens: int, num_decodes: int, num_prompts: int) -> MetadataShape:
        """Large enough for all steps of at most so many tokens, decodes and prompts."""
        ...

    def empty_metadata(self, shape: MetadataShape) -> AttentionMetadata:
        """On the CPU, for ``fill_metadata``."""
        ...

    def fill_metadata(
        self, arrays: Sequence[np.ndarray], spans_S4: np.ndarray, num_decodes: int
    ) -> None:
        """Writes a step to the arrays of an ``AttentionMetadata``, and padding behind it."""
        ...

    def use(self, metadata: AttentionMetadata) -> None:
        """Sets the step of the next forward."""


class StepResult(NamedTuple):
    """What a forward of a step computes."""

    logits: Tensor
    """float32 ``[R, V]``; valid until the next step."""
    token_ids: Tensor | None = None
    """int64 ``[R]``: a token sampled from each row, by the slots' parameters alone (no grammar,
    penalties, bias or bans); valid until the next step. None if none was sampled yet."""


def graph_sizes(max_num_tokens: int) -> list[int]:
    """The sizes of graphs of decodes, ascending, the last of at least ``max_num_tokens``."""
    sizes = [1, 2, 4, *range(8, DENSE_UP_TO + 1, 8)]
    while sizes[-1] < max_num_tokens:
        sizes.append(2 * sizes[-1])
    return sizes[: bisect.bisect_left(sizes, max_num_tokens) + 1]


def mixed_graph_sizes(max_num_batched_tokens: int) -> list[int]:
    """The sizes of graphs of steps with prompts, ascending."""
    return list(MIXED_SIZES[: bisect.bisect_left(MIXED_SIZES, max_num_batched_tokens) + 1])


@dataclass
class _Recording:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    """uint8, what ``staging`` is copied to."""
    staging: tuple[HostArrays, HostArrays]
    """Used in turns: while one is copied, the next step is written to the other."""
    num_decodes: int
    result: StepResult


class StepGraphs:
    """Graphs for 1, 2, 4, 8, 16, 24, ... 256, 512, ... decodes, up to at least ``max_decodes``, and
    for steps with prompts of ``MIXED_SIZES`` tokens.

    A step runs the smallest graph that is large enough.
    """

    def __init__(self, model: InferenceModel, cache: GraphCache, limits: GraphLimits):
        self._model, self._cache, self._device = model, cache, cache.device
        self._limits = limits
        self._sampler: Sampler | None = None
        self.sizes = graph_sizes(limits.max_decodes)
        self.mixed_sizes = mixed_graph_sizes(limits.max_num_batched_tokens)
        num_rows = max(self.sizes[-1], limits.max_num_seqs)
        self._previous_ids = torch.zeros(num_rows, dtype=torch.int64, device=self._device)
        """Tokens that the previous step sampled, by row."""
        sizes = [(True, n) for n in self.mixed_sizes] + [(False, n) for n in self.sizes]
        # The largest first: the others share its memory pool.
        self._all_sizes = sorted(sizes, key=lambda size: -size[1])
        shape = max(self._capacity(*size)[2] for size in sizes), model.config.vocab_size
        self._logits = torch.empty(shape, dtype=torch.float32, device=self._device)
        """``[R, V]``, which every graph writes: with rows of their own all together would have
        some 10,000 of 128 KiB, at 32,768 tokens of the vocabulary."""
        self._recordings: dict[tuple[bool, int], _Recording] = {}
        """By whether there are prompts, and the number of tokens."""
        self._num_runs = 0

    def record(self, sampler: Sampler | None = None) -> None:
        """Records all graphs; with a ``sampler`` they sample too."""
        self._sampler = sampler
        # One for all: cuBLAS keeps a workspace of 32 MiB for each stream on a Hopper card.
        stream = torch.cuda.Stream(self._device)
        for size in self._all_sizes:
            self._recordings[size] = self._record(*size, stream)

    def _capacity(self, has_prompts: bool, num_tokens: int) -> tuple[int, int, int]:
        """Decodes, prompts and rows of logits of a graph, at most."""
        if not has_prompts:
            return num_tokens, 0, num_tokens
        num_decodes = min(num_tokens, self._limits.max_decodes)
        num_prompts = max(MIXED_PROMPTS, num_tokens // 64)
        return num_decodes, num_prompts, min(num_tokens, num_decodes + num_prompts)

    def _example(self, has_prompts: bool, num_tokens: int) -> tuple[list[Tensor], int]:
        """Inputs of a step that is nothing but padding, on the CPU, and the number of decodes."""
        num_decodes, num_prompts, num_rows = self._capacity(has_prompts, num_tokens)
        shape = self._cache.graph_shape(num_tokens, num_decodes, num_prompts)
        metadata = self._cache.empty_metadata(shape)
        arrays = [tensor.numpy() for tensor in metadata.tensors()]
        spans = np.zeros((0, 4), dtype=np.int64)
        self._cache.fill_metadata(arrays, spans, shape.num_decodes)
        tokens_3N = torch.zeros((3, num_tokens), dtype=torch.int64)
        rows_3R = torch.zeros((3, num_rows), dtype=torch.int64)
        return [tokens_3N, rows_3R, *metadata.tensors()], shape.num_decodes

    @torch.inference_mode()
    def _record(self, has_prompts: bool, num_tokens: int, stream: torch.cuda.Stream) -> _Recording:
        device = self._device
        example, num_decodes = self._example(has_prompts, num_tokens)
        inputs = pack(example).to(device)
        tokens_3N, rows_3R, *tensors = unpack(inputs, example)
        metadata = AttentionMetadata(num_decodes, *tensors)
        # Libraries initialise themselves in the first run, which must not be recorded.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._forward(tokens_3N, rows_3R, metadata)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        first = next(iter(self._recordings.values()), None)
        pool = first.graph.pool() if first else None
        # Another engine of this process may run in its own thread at the same time.
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            result = self._forward(tokens_3N, rows_3R, metadata)
        staging = HostArrays(example, device), HostArrays(example, device)
        return _Recording(graph, inputs, staging, num_decodes, result)

    def _forward(
        self, tokens_3N: Tensor, rows_3R: Tensor, metadata: AttentionMetadata
    ) -> StepResult:
        self._cache.use(metadata)
        ids, previous, source_rows = tokens_3N
        indices, slots, positions = rows_3R
        ids = torch.where(source_rows >= 0, self._previous_ids[source_rows], ids)
        hidden = self._model.hidden(ids, previous, self._cache)
        logits = self._model.logits(hidden[indices], self._logits[: len(indices)])
        sampler = self._sampler
        return StepResult(logits, sampler and sampler(logits, slots, positions))

    def _size_for(self, step: StepInputs) -> tuple[bool, int] | None:
        """The graph for a step, if there is one."""
        num_tokens, has_prompts = len(step.token_ids), step.num_decodes < len(step.spans_S4)
        sizes = self.mixed_sizes if has_prompts else self.sizes
        at = bisect.bisect_left(sizes, num_tokens)
        if at == len(sizes):
            return None
        sizes_of_step = (
            step.num_decodes,
            len(step.spans_S4) - step.num_decodes,
            len(step.logits_indices),
        )
        capacity = self._capacity(has_prompts, sizes[at])
        fits = all(size <= most for size, most in zip(sizes_of_step, capacity, strict=True))
        return (has_prompts, sizes[at]) if fits else None

    def run(self, step: StepInputs, previous_ids: Tensor | None) -> StepResult | None:
        """Logits and tokens of the step's ``logits_indices``; None if no graph is large enough.
        ``previous_ids`` int64 are the tokens that the previous step sampled, if there are
        placeholders."""
        size = self._size_for(step)
        if size is None:
            return None
        recording = self._recordings[size]
        if previous_ids is not None and step.has_placeholders:
            self._previous_ids[: len(previous_ids)].copy_(previous_ids)
        self._num_runs += 1
        staging = recording.staging[self._num_runs % 2]
        staging.wait()
        tokens_3N, rows_3R, *metadata = staging.arrays
        N, R = len(step.token_ids), len(step.logits_indices)
        tokens_3N[0, :N], tokens_3N[1, :N] = step.token_ids, step.previous_ids
        tokens_3N[2, :N] = step.source_rows
        tokens_3N[:2, N:], tokens_3N[2, N:] = 0, -1
        rows_3R[0, :R] = step.logits_indices
        rows_3R[1, :R], rows_3R[2, :R] = step.logits_slots, step.logits_positions
        rows_3R[0, R:], rows_3R[1, R:], rows_3R[2, R:] = 0, self._limits.max_num_seqs, 0
        self._cache.fill_metadata(metadata, step.spans_S4, recording.num_decodes)
        staging.send(recording.inputs)
        recording.graph.replay()
        logits, token_ids = recording.result
        return StepResult(logits[:R], None if token_ids is None else token_ids[:R])
