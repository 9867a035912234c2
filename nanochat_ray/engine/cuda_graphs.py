"""Decoding steps recorded once for each size of batch, and replayed: a launch for all kernels.

A small model on a large GPU waits for Python to launch its kernels; a graph takes that away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.kvcache.paged_cache import AttentionMetadata, PagedCache
from nanochat_ray.engine.model import InferenceModel


@dataclass
class _Recording:
    """A graph with the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    tokens: Tensor
    """int64 ``[2, rows]``: the tokens, and those before them."""
    metadata: AttentionMetadata
    logits: Tensor


class DecodeGraphs:
    """Graphs for 1, 2, 4, 8, ... rows up to ``most``, of one row for each sequence."""

    def __init__(self, model: InferenceModel, cache: PagedCache, most: int):
        self._model, self._cache = model, cache
        sizes = [1]
        while sizes[-1] < most:
            sizes.append(2 * sizes[-1])
        self.largest = sizes[-1]
        # The largest first: the others find room in the memory that it leaves.
        self._recordings: dict[int, _Recording] = {}
        for rows in reversed(sizes):
            self._recordings[rows] = self._record(rows)

    @torch.inference_mode()
    def _record(self, rows: int) -> _Recording:
        device = self._cache.device
        tokens = torch.zeros((2, rows), dtype=torch.int64, device=device)
        metadata = self._cache.make_metadata([], rows).to(device)
        # Libraries set themselves up in the first run, which must not be recorded.
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._forward(tokens, metadata)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        first = self._recordings.get(self.largest)
        pool = first.graph.pool() if first else None
        # Another engine of this process may run meanwhile, in a thread of its own.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            logits = self._forward(tokens, metadata)
        return _Recording(graph, tokens, metadata, logits)

    def _forward(self, tokens: Tensor, metadata: AttentionMetadata) -> Tensor:
        self._cache.use(metadata)
        ids, before = tokens
        return self._model.logits(self._model.hidden(ids, before, self._cache))

    def rows(self, count: int) -> int:
        """Rows of the graph that runs so many, or 0 if there is none for as many."""
        return 1 << (count - 1).bit_length() if count <= self.largest else 0

    def run(self, tokens: Tensor, spans: Sequence[Span]) -> Tensor:
        """float32 logits ``[rows, V]`` of spans of one token each, and of padding; valid up to the
        next run. ``tokens [2, rows]`` as in a recording."""
        rows = tokens.size(1)
        found = self._recordings[rows]
        found.tokens.copy_(tokens)
        found.metadata.copy_(self._cache.make_metadata(spans, rows))
        found.graph.replay()
        return found.logits
