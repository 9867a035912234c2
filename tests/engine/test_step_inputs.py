"""The flat tokens of a step and their padding, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat_ray.engine.kvcache.padding import padded_length, padded_queries, slot_length
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.sequence import PLACEHOLDER, Sequence
from nanochat_ray.engine.step_inputs import StepInputs


def sequence(slot: int, tokens: list[int], start: int, **fields: Any) -> Sequence:
    request = Request(id="a", prompt=tokens, params=SamplingParams(**fields))
    s = Sequence(request, list(tokens), seed=0, max_length=99, slot=slot)
    s.prefill_spans, s.num_computed_tokens = [(0, len(tokens))], start
    return s


def test_tokens_chunk_by_chunk() -> None:
    in_flight = sequence(5, [40, 41], 2)
    in_flight.num_placeholders, in_flight.placeholder_row = 1, 3
    with_logprobs = sequence(6, [50, 51, 52], 1, prompt_logprobs=0)
    with_logprobs.prompt_logprobs = []
    step = StepInputs(
        [
            ScheduledChunk.of(sequence(1, [10, 11], 1), 1, True),
            ScheduledChunk.of(sequence(2, [20, 21], 1), 1, True, (22, 23)),
            ScheduledChunk.of(in_flight, 1, True),
            ScheduledChunk.of(sequence(3, [30, 31, 32, 33], 0), 3),  # it does not reach the end
            ScheduledChunk.of(sequence(4, [35, 36, 37], 1), 2),
            ScheduledChunk.of(with_logprobs, 2),
        ]
    )
    assert step.token_ids == [11, 21, 22, 23, PLACEHOLDER, 30, 31, 32, 36, 37, 51, 52]
    assert step.previous_ids == [10, 20, 21, 22, 41, -1, 30, 31, 35, 36, 50, 51]
    assert step.spans_S4.tolist() == [
        [1, 1, 1, 1],
        *([2, position, 1, 1] for position in (1, 2, 3)),
        [5, 2, 1, 1],
        [3, 0, 3, 0],
        [4, 1, 2, 0],
        [6, 1, 2, 0],
    ]
    assert step.num_decodes == 5
    assert step.logits_indices == [0, 1, 2, 3, 4, 9, 10, 11]
    assert step.logits_slots == [1, 2, 2, 2, 5, 4, 6, 6]
    assert step.logits_positions == [2, 2, 3, 4, 3, 3, 2, 3]
    assert step.placeholders == [(4, 3)]
    assert step.source_rows == [-1] * 4 + [3] + [-1] * 7


def test_plain_decodes_are_as_one_by_one() -> None:
    """Those before any other chunk take a shorter way."""
    in_flight = sequence(5, [40, 41], 2)
    in_flight.num_placeholders, in_flight.placeholder_row = 1, 3
    decodes = [
        ScheduledChunk.of(sequence(1, [10, 11], 1), 1, True),
        ScheduledChunk.of(sequence(2, [12], 0), 1, True),
        ScheduledChunk.of(in_flight, 1, True),
    ]
    assert all(chunk.is_plain_decode for chunk in decodes)
    assert decodes == [ScheduledChunk.of_decode(chunk.sequence) for chunk in decodes]
    short = StepInputs(decodes)
    # A chunk of nothing makes the others take the long way.
    long = StepInputs([ScheduledChunk(decodes[0].sequence, 0, 0), *decodes])
    assert short.token_ids == long.token_ids == [11, 12, PLACEHOLDER]
    assert short.previous_ids == [10, -1, 41]
    assert short.spans_S4.tolist() == [
        [slot, start, 1, 1] for slot, start in ((1, 1), (2, 0), (5, 2))
    ]
    for name in ("source_rows", "logits_indices", "logits_slots", "logits_positions"):
        assert getattr(short, name) == getattr(long, name), name


def test_a_first_token_has_none_before_it() -> None:
    step = StepInputs([ScheduledChunk.of(sequence(0, [7], 0), 1)])
    assert (step.token_ids, step.previous_ids) == ([7], [-1])
    assert step.spans_S4.tolist() == [[0, 0, 1, 0]]
    assert (step.logits_indices, step.placeholders) == ([0], [])


@pytest.mark.parametrize(
    ("length", "one", "many"),
    [
        *((1, 16, 16), (16, 16, 16), (17, 32, 32), (256, 256, 256), (257, 272, 512)),
        *((500, 512, 512), (512, 512, 512), (513, 528, 528), (768, 768, 768), (769, 784, 1024)),
    ],
)
def test_padded_keys(length: int, one: int, many: int) -> None:
    """For one query, and for several: not between 256 and 512 beyond a multiple of 512."""
    assert (padded_length(length, 1), padded_length(length, 2)) == (one, many)
    assert (slot_length(length, native=True), slot_length(length, native=False)) == (one, many)


@pytest.mark.parametrize(
    ("queries", "count"),
    [(1, 8), (7, 8), (8, 8), (9, 9), (31, 31), (32, 32), (33, 40), (39, 40), (40, 40), (64, 64)],
)
def test_padded_queries(queries: int, count: int) -> None:
    assert padded_queries(queries) == count
