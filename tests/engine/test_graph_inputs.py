"""What a CUDA graph reads: a step in tensors that are larger than it, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nanochat_ray.engine import cuda_graphs
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.cuda_graphs import GraphLimits, StepGraphs, StepResult
from nanochat_ray.engine.kvcache.attention_metadata import AttentionMetadata, tile_tokens
from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.kvcache.memory import make_allocator
from nanochat_ray.engine.kvcache.paged_cache import PagedCache
from nanochat_ray.engine.model import InferenceModel
from nanochat_ray.engine.step_inputs import StepInputs
from tests.engine.engine_kit import VOCAB, make_model

CPU = torch.device("cpu")
DECODES = [Span(1, 30, 1, True), Span(3, 4, 1, True)]
MIXED = [*DECODES, Span(0, 0, 9, False), Span(2, 11, 6, False)]


def make_cache(**fields: Any) -> tuple[InferenceModel, PagedCache]:
    """4 slots of 64 tokens, some of which have keys and values."""
    training_model = make_model("modern", n_layer=2, **fields)
    model = InferenceModel(training_model.config, training_model.state_dict())
    settings = EngineConfig(max_num_seqs=4)
    blocks = make_allocator(model.config, settings, 64, torch.float32, 1 << 30)
    cache = PagedCache(model.config, blocks, 4, 64, torch.float32, CPU)
    for slot in range(4):
        tables = blocks.empty_tables()
        assert blocks.extend(tables, 0, 40)
        cache.set_block_tables(slot, tables)
        forward(model, cache, cache.make_metadata([Span(slot, 0, 30, False)]), slot)
    return model, cache


def forward(
    model: InferenceModel, cache: PagedCache, metadata: AttentionMetadata, seed: int
) -> Tensor:
    N = metadata.positions.size(0)
    ids = torch.randint(VOCAB, (2, 64), generator=torch.Generator().manual_seed(seed))
    cache.use(metadata)
    with torch.inference_mode():
        return model.hidden(ids[0, :N], ids[1, :N], cache)


@pytest.mark.parametrize("tile", [4, 64])
@pytest.mark.parametrize(
    ("spans", "capacity"),
    [(DECODES, (8, 8, 0)), (MIXED, (32, 4, 3)), (MIXED[2:], (17, 4, 2)), (MIXED, (17, 2, 2))],
)
def test_padding_changes_no_token(
    spans: list[Span], capacity: tuple[int, int, int], tile: int
) -> None:
    model, cache = make_cache()
    cache._tile_tokens = tile
    exact = forward(model, cache, cache.make_metadata(spans), 9)
    shape = cache.graph_shape(*capacity)
    metadata = cache.empty_metadata(shape)
    for tensor in metadata.tensors():
        tensor.fill_(1)  # of an earlier step
    arrays = [tensor.numpy() for tensor in metadata.tensors()]
    cache.fill_metadata(arrays, np.array(spans, dtype=np.int64), shape.num_decodes)
    output = forward(model, cache, metadata, 9)
    torch.testing.assert_close(output[: len(exact)], exact, atol=1e-5, rtol=0)
    assert bool(output.isfinite().all())
    rows = sorted(
        row for _, first, count, _ in metadata.tiles.tolist() for row in range(first, first + count)
    )
    assert rows == list(range(capacity[0]))  # each token in one tile


def test_tiles_of_a_prompt() -> None:
    _, cache = make_cache()
    cache._tile_tokens = 4
    metadata = cache.make_metadata(MIXED)
    assert metadata.num_decodes == 2
    assert metadata.tiles.tolist() == [
        *([0, 0, 1, 30], [1, 1, 1, 4]),
        *([2, 2, 4, 0], [2, 6, 4, 4], [2, 10, 1, 8]),
        *([3, 11, 4, 11], [3, 15, 2, 15]),
    ]
    assert metadata.positions.tolist() == [30, 4, *range(9), *range(11, 17)]
    pages = cache._block_tables[0]
    want = [pages[1, 1] * 16 + 14, pages[3, 0] * 16 + 4]
    assert metadata.slot_mapping[0, :2].tolist() == want
    assert [tile_tokens(group) for group in (1, 2, 3, 4, 64, 99)] == [64, 32, 16, 16, 1, 1]


class Replay:
    """In place of a CUDA graph: runs what would be recorded."""

    def __init__(self, run: Any):
        self.replay = run

    def pool(self) -> None:
        """None is shared."""


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> StepGraphs:
    """Of a model and a cache on the CPU, which "sample" the number of a slot plus 10 times the
    position."""
    monkeypatch.setattr(cuda_graphs, "MIXED_SIZES", (8, 32))
    model, cache = make_cache()
    graphs = StepGraphs(model, cache, GraphLimits(4, 4, 32))
    record = StepGraphs._record
    streams: list[Any] = []

    def make_stream(device: torch.device) -> Any:
        streams.append(SimpleNamespace(wait_stream=lambda other: None))
        return streams[-1]

    monkeypatch.setattr(torch.cuda, "Stream", make_stream)

    def fake(self: StepGraphs, has_prompts: bool, num_tokens: int, stream: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "current_stream", lambda device: stream)
            patch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(pool=lambda: None))
            for name in ("stream", "graph"):
                patch.setattr(torch.cuda, name, lambda *args, **rest: torch.inference_mode())
            calls: list[Any] = []
            run = self._forward
            patch.setattr(self, "_forward", lambda *args: (calls.append(args), run(*args))[1])
            recording = record(self, has_prompts, num_tokens, stream)

        def replay() -> None:
            result = run(*calls[-1])
            recording.result.logits.copy_(result.logits)
            assert recording.result.token_ids is not None
            recording.result.token_ids.copy_(result.token_ids)

        recording.graph = Replay(replay)  # type: ignore[assignment]
        return recording

    monkeypatch.setattr(StepGraphs, "_record", fake)
    graphs.record(lambda logits, slots, positions: slots + 10 * positions)
    assert len(streams) == 1  # cuBLAS keeps a workspace for each
    return graphs


def step_of(spans: list[Span], rows: dict[int, int] | None = None) -> StepInputs:
    """Tokens are numbered; ``rows`` of the previous step sample some of them."""
    step = StepInputs([])
    step.spans_S4 = np.array(spans, dtype=np.int64)
    step.num_decodes = sum(span.is_decode for span in spans)
    count = sum(span.num_tokens for span in spans)
    step.token_ids = [5 + i for i in range(count)]
    step.previous_ids = [4 + i for i in range(count)]
    step.source_rows = [-1] * count
    for i, row in (rows or {}).items():
        step.source_rows[i] = row
    ends = np.cumsum([span.num_tokens for span in spans])
    step.logits_indices = [int(end) - 1 for end in ends]
    step.logits_slots = [span.slot for span in spans]
    step.logits_positions = [span.start + span.num_tokens for span in spans]
    return step


@torch.inference_mode()
def by_hand(graphs: StepGraphs, step: StepInputs, ids: list[int]) -> Tensor:
    cache, model = graphs._cache, graphs._model
    assert isinstance(cache, PagedCache)
    cache.prepare(step.spans_S4)
    hidden = model.hidden(torch.tensor(ids), torch.tensor(step.previous_ids), cache)
    return model.logits(hidden[step.logits_indices])


@pytest.mark.parametrize("spans", [DECODES, MIXED, MIXED[2:]])
@torch.inference_mode()
def test_a_graph_runs_the_step(graphs: StepGraphs, spans: list[Span]) -> None:
    step = step_of(spans, {1: 3, 0: 0})
    want = by_hand(graphs, step, [70, 73, *step.token_ids[2:]])
    graphs.run(step_of(MIXED), None)  # leaves nothing behind
    result = graphs.run(step, torch.tensor([70, 71, 72, 73]))
    assert isinstance(result, StepResult)
    torch.testing.assert_close(result.logits, want, atol=1e-4, rtol=0)
    assert result.token_ids is not None
    assert result.token_ids.tolist() == [s.slot + 10 * (s.start + s.num_tokens) for s in spans]


@pytest.mark.parametrize(
    "spans",
    [
        [Span(0, i, 1, True) for i in range(5)],  # more decodes than any graph has
        [Span(0, 0, 33, False)],  # more tokens
        [Span(0, 0, 1, False)] * 17,  # more prompts
    ],
)
def test_a_larger_step_has_no_graph(graphs: StepGraphs, spans: list[Span]) -> None:
    assert graphs.run(step_of(spans), None) is None


def test_graphs_share_their_logits(graphs: StepGraphs) -> None:
    """Else 59 graphs of up to 384 rows would hold 1.4 GB at 32,768 tokens of the vocabulary."""
    results = [recording.result.logits for recording in graphs._recordings.values()]
    assert len(results) > 2
    assert len({logits.untyped_storage().data_ptr() for logits in results}) == 1
    assert max(len(logits) for logits in results) == len(graphs._logits) == 20
