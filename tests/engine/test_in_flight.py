"""Which rows of a step are sampled, where, and with which tokens counted, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanochat_ray.engine.cuda_graphs import StepResult
from nanochat_ray.engine.in_flight import ForwardOutput, sample
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.engine.sampling_state import SamplingState
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.sequence import PLACEHOLDER, Sequence

VOCAB = 8


def sequence(slot: int, length: int, **fields: Any) -> Sequence:
    request = Request(id="a", prompt=[1] * length, params=SamplingParams(**fields))
    s = Sequence(request, [1] * length, seed=0, max_length=99, slot=slot)
    s.prefill_spans, s.num_computed_tokens = [(0, length - 1)], length - 1
    return s


class Recorder(SamplingState):
    """Chooses the row's own number."""

    calls: list[tuple[Any, ...]]
    counts_tokens = True

    def choose(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        self.calls = [logits[:, 0].tolist(), *args]
        return torch.arange(len(logits))


@pytest.fixture
def state() -> Recorder:
    return Recorder(9, VOCAB, torch.device("cpu"))


def logits(rows: int) -> torch.Tensor:
    return torch.arange(rows).float()[:, None].expand(-1, VOCAB)


def test_drafts_are_counted_before_their_rows(state: Recorder) -> None:
    plain, with_draft = sequence(3, 5), sequence(7, 9, logprobs=0)
    chunks = [
        (0, ScheduledChunk.of(plain, 1, True)),
        (2, ScheduledChunk.of(with_draft, 1, True, (4, 5))),
    ]
    step = sample(ForwardOutput(logits(6), chunks), state, None)
    rows, slots, positions, masks, pairs_to_count, device_tokens = state.calls
    assert rows == [0, 2, 3, 4]
    assert slots == [3, 7, 7, 7]
    assert positions == [5, 9, 10, 11]
    assert pairs_to_count == [(2, 4), (3, 4), (3, 5)]
    assert (masks, device_tokens) == (None, None)
    token_ids, logprobs = step.wait()
    assert token_ids == [0, 1, 2, 3]
    assert [entry is None for entry in logprobs] == [True, False, False, False]
    assert step.has_draft
    assert step.chunks == [chunk for _, chunk in chunks]


def test_rows_of_the_chunks_that_sample() -> None:
    """Each is that of the chunk's last token; those of its draft tokens follow."""
    half, whole = sequence(1, 5), sequence(2, 4, prompt_logprobs=0)
    half.num_computed_tokens, half.prefill_spans = 0, [(0, 5)]
    whole.num_computed_tokens, whole.prefill_spans, whole.prompt_logprobs = 0, [(0, 4)], []
    drafts, plain = sequence(3, 9), sequence(4, 5)
    chunks = [
        ScheduledChunk.of(half, 2),  # no logits: it does not reach the end
        ScheduledChunk.of(whole, 4),  # logits of all four tokens
        ScheduledChunk.of(drafts, 1, True, (4, 5)),
        ScheduledChunk.of(plain, 1, True),
    ]
    forward = ForwardOutput.of(chunks, StepResult(logits(8)))
    assert [(row, chunk.sequence.slot) for row, chunk in forward.sampling_chunks] == [
        (3, 2),
        (4, 3),
        (7, 4),
    ]
    assert forward.prompt_logprobs is not None
    assert ForwardOutput.of(chunks[2:], StepResult(logits(4))).prompt_logprobs is None


def test_a_grammar_masks_its_rows(state: Recorder) -> None:
    """One row behind the chunk and one behind each draft token."""
    plain, with_grammar = sequence(3, 5), sequence(7, 9)
    with_grammar.grammar = object()  # type: ignore[assignment]
    calls: list[Any] = []

    class Masks:
        def next_token_mask(self, rows: list[Any]) -> str:
            calls.append(rows)
            return "mask"

    chunks = [
        (0, ScheduledChunk.of(plain, 1, True)),
        (1, ScheduledChunk.of(with_grammar, 1, True, (4, 5))),
    ]
    forward = ForwardOutput(logits(4), chunks)
    sample(forward, state, Masks())  # type: ignore[arg-type]
    assert state.calls[3] == ([1, 2, 3], "mask")
    assert calls == [[(with_grammar.grammar, (4, 5))]]
    assert forward.needs_previous_tokens
    assert not ForwardOutput(logits(1), chunks[:1]).needs_previous_tokens


def test_a_token_in_flight_is_counted_on_the_device(state: Recorder) -> None:
    first, second = sequence(1, 4), sequence(2, 4)
    second.num_placeholders, second.placeholder_row, second.num_computed_tokens = 1, 6, 4
    chunks = [(i, ScheduledChunk.of(s, 1, True)) for i, s in enumerate((first, second))]
    previous_ids = torch.arange(9)
    step = sample(ForwardOutput(logits(2), chunks), state, None, previous_ids)
    _, slots, positions, _, pairs_to_count, (pairs, source) = state.calls
    assert (slots, positions) == ([1, 2], [4, 5])
    assert pairs_to_count == [(1, PLACEHOLDER)]
    assert pairs == [(0, 6)]
    assert source is previous_ids
    assert not step.has_draft


def test_a_sequence_that_ended_is_left_out(state: Recorder) -> None:
    complete, longer, runs = (sequence(slot, 4) for slot in (1, 2, 3))
    chunks = [(i, ScheduledChunk.of(s, 1, True)) for i, s in enumerate((complete, longer, runs))]
    complete.is_finished = True
    longer.tokens += [5]  # a tool's output
    step = sample(ForwardOutput(logits(3), chunks), state, None)
    rows, slots, *_ = state.calls
    assert (rows, slots) == ([2], [3])
    assert [chunk.sequence for chunk in step.chunks] == [runs]


def test_the_tokens_of_the_forward_are_enough(state: Recorder) -> None:
    """If all of its rows are sampled from, and nothing adjusts their logits."""
    s, other = sequence(1, 4), sequence(2, 4)
    chunks = [(i, ScheduledChunk.of(each, 1, True)) for i, each in enumerate((s, other))]
    forward = ForwardOutput(logits(2), chunks, token_ids=torch.tensor([5, 6]))
    assert sample(forward, state, None).wait()[0] == [5, 6]
    state.admit(sequence(2, 4, presence_penalty=1.0))
    assert sample(forward, state, None).wait()[0] == [0, 1]
    state.admit(sequence(2, 4))
    other.is_finished = True
    assert sample(forward, state, None).wait()[0] == [0]


def test_tokens_that_are_no_token_are_input_0() -> None:
    state = Recorder(9, VOCAB, torch.device("cpu"))
    step = sample(ForwardOutput(logits(0), []), state, None)
    assert step.wait() == ([], [])
    step.token_ids.resize_(2).copy_(torch.tensor([-1, 5]))
    assert step.input_ids().tolist() == [0, 5]
