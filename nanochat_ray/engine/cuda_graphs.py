"""CUDA graphs of decode steps: recorded once for each batch size, then replayed.

A graph launches all kernels of a step at once, since a small model on a large GPU would otherwise
wait for Python to launch them one by one.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanochat_ray.engine.kvcache.attention_metadata import AttentionMetadata
from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.model import AttentionCache, InferenceModel

DENSE_UP_TO = 256
"""Graphs are 8 tokens apart up to this, since a step of 9 sequences should not cost that of 16."""


class GraphCache(AttentionCache, Protocol):
    """A KV cache whose steps are described by tensors (``kvcache.paged_cache.PagedCache``)."""

    device: torch.device

    def make_metadata(self, spans: Sequence[Span], num_tokens: int = 0) -> AttentionMetadata:
        """The step of these spans, padded to at least ``num_tokens``."""
        ...

    def use(self, metadata: AttentionMetadata) -> None:
        """Sets the step of the next forward."""


def graph_sizes(max_num_tokens: int) -> list[int]:
    """The sizes of graphs, ascending, of which the last is at least ``max_num_tokens``."""
    sizes = [1, 2, 4, *range(8, DENSE_UP_TO + 1, 8)]
    while sizes[-1] < max_num_tokens:
        sizes.append(2 * sizes[-1])
    return sizes[: bisect.bisect_left(sizes, max_num_tokens) + 1]


@dataclass
class _Recording:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    """int64 ``[2, N]``: the tokens, and those before them."""
    metadata: AttentionMetadata
    logits: Tensor


class DecodeGraphs:
    """Graphs for 1, 2, 4, 8, 16, 24, ... 256, 512, ... tokens, up to at least ``max_num_tokens``.

    A step runs the smallest graph that is large enough, so up to 7 rows of it are padding.
    """

    def __init__(self, model: InferenceModel, cache: GraphCache, max_num_tokens: int):
        self._model, self._cache = model, cache
        self.sizes = graph_sizes(max_num_tokens)
        self.largest = self.sizes[-1]
        # The largest first: the others share its memory pool.
        self._recordings: dict[int, _Recording] = {}
        for num_tokens in reversed(self.sizes):
            self._recordings[num_tokens] = self._record(num_tokens)

    @torch.inference_mode()
    def _record(self, num_tokens: int) -> _Recording:
        device = self._cache.device
        tokens = torch.zeros((2, num_tokens), dtype=torch.int64, device=device)
        metadata = self._cache.make_metadata([], num_tokens).to(device)
        # Libraries initialise themselves in the first run, which must not be recorded.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._forward(tokens, metadata)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        first = self._recordings.get(self.largest)
        pool = first.graph.pool() if first else None
        # Another engine of this process may run in its own thread at the same time.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self._forward(tokens, metadata)
        return _Recording(graph, tokens, metadata, logits)

    def _forward(self, tokens: Tensor, metadata: AttentionMetadata) -> Tensor:
        self._cache.use(metadata)
        ids, before = tokens
        return self._model.logits(self._model.hidden(ids, before, self._cache))

    def padded_size(self, num_tokens: int) -> int:
        """Tokens of the smallest graph for this many, or 0 if no graph is large enough."""
        at = bisect.bisect_left(self.sizes, num_tokens)
        return self.sizes[at] if at < len(self.sizes) else 0

    def run(self, tokens: Tensor, spans: Sequence[Span]) -> Tensor:
        """float32 logits ``[N, V]`` of spans of one token each and of padding; valid until the next
        run. ``tokens [2, N]`` as in a recording, with N a ``padded_size``."""
        num_tokens = tokens.size(1)
        recording = self._recordings[num_tokens]
        recording.tokens.copy_(tokens)
        recording.metadata.copy_(self._cache.make_metadata(spans, num_tokens))
        recording.graph.replay()
        return recording.logits
