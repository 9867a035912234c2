"""One row of parameters for each slot, against the sampler of one row."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.engine.sampling_state import SamplingState
from nanochat_ray.engine.sequence import Sequence
from tests.engine.engine_kit import VOCAB
from tests.engine.test_sampled_tokens import PARAMS, next_token

CPU = torch.device("cpu")
PROMPT = [3, 5, 5, 8]


def sequence(slot: int, answer: list[int], **fields: Any) -> Sequence:
    params = SamplingParams(**{"temperature": 1.0, "seed": 11} | fields)
    request = Request(id="x", prompt=PROMPT, params=params)
    return Sequence(
        request,
        [*PROMPT, *answer],
        seed=11,
        max_length=99,
        stop_token_ids=params.all_stop_ids,
        prefill_spans=[(0, 4)],
        slot=slot,
    )


def logits(rows: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("before", ["bias then penalties", "all", "minimum"])
def test_a_row_alone_is_the_references(name: str, before: str) -> None:
    """Whatever request had the slot before, and without a feature that another row needs."""
    state = SamplingState(3, VOCAB, CPU)
    state.admit(sequence(1, [7, 7, 40], **PARAMS[before]))
    answer = [9, 9, 5, 20]
    state.admit(sequence(1, answer[:2], **PARAMS[name]))
    for token in answer[2:]:
        state.count([1], [token])
    params = sequence(1, [], **PARAMS[name]).request.params
    for seed in range(12):
        row = logits(1, seed)
        (token,) = state.choose(row, [1], [8]).tolist()
        assert token == next_token(row[0], PROMPT, answer, params)


def test_rows_do_not_mix() -> None:
    """Every row in one batch, in an order that is not that of the slots."""
    names = list(PARAMS)
    random.Random(1).shuffle(names)
    state = SamplingState(len(names) + 1, VOCAB, CPU)
    for slot, name in enumerate(names, 1):
        state.admit(sequence(slot, [9, slot], **PARAMS[name]))
    slots = list(range(1, len(names) + 1))[::-1]
    rows = logits(len(names))
    tokens = state.choose(rows, slots, [6] * len(slots)).tolist()
    assert tokens == [
        next_token(
            row, PROMPT, [9, slot], sequence(slot, [], **PARAMS[names[slot - 1]]).request.params
        )
        for row, slot in zip(rows, slots, strict=True)
    ]


def test_uncounted_tokens_are_penalised_once() -> None:
    """Those of an in-flight step, of which the device knows one: they are not stored."""
    state = SamplingState(2, VOCAB, CPU)
    state.admit(sequence(0, [9], frequency_penalty=2.0, temperature=0.0))
    state.admit(sequence(1, [], temperature=0.0))
    row = torch.zeros(2, VOCAB)
    row[:, 9], row[:, 20], row[:, 30] = 9.0, 8.0, 7.5
    assert state.choose(row, [0, 1], [5, 4]).tolist() == [20, 9]
    assert state.choose(row, [0, 1], [6, 4], uncounted_tokens=[(0, 20)]).tolist() == [30, 9]
    sampled_ids = torch.tensor([7, 20])
    tokens = state.choose(
        row, [0, 1], [6, 4], uncounted_tokens=[(0, 0)], device_tokens=([(0, 1)], sampled_ids)
    )
    assert tokens.tolist() == [30, 9]
    assert state.choose(row, [0, 1], [5, 4]).tolist() == [20, 9]
    state.count([0, 1], [20, 9])
    assert state.choose(row, [0, 1], [6, 5]).tolist() == [30, 9]


def test_bans_end_with_their_request() -> None:
    """The next one in its slot has none, also beside a row that has."""
    state = SamplingState(2, VOCAB, CPU)
    for slot in (0, 1):
        state.admit(sequence(slot, [], min_tokens=2, stop_ids=(7,), temperature=0.0))
    state.admit(sequence(1, [], temperature=0.0))
    row = torch.zeros(2, VOCAB)
    row[:, 7], row[:, 9] = 3.0, 1.0
    assert state.choose(row, [0, 1], [4, 4]).tolist() == [9, 7]


def test_stop_tokens_are_banned_until_the_minimum() -> None:
    state = SamplingState(2, VOCAB, CPU)
    state.admit(sequence(0, [], min_tokens=2, stop_ids=(7,), eos_ids=(8,), temperature=0.0))
    state.admit(sequence(1, [], min_tokens=2, temperature=0.0))
    row = torch.zeros(2, VOCAB)
    row[:, 7], row[:, 8], row[:, 9] = 3.0, 2.0, 1.0
    # Positions 4 and 5 are those of the first two tokens.
    for position, token in ((4, 9), (5, 9), (6, 7)):
        assert state.choose(row, [0, 1], [position] * 2).tolist() == [token, 7]


def test_output_counts_toward_the_minimum() -> None:
    """Of a request that goes on elsewhere, or after preemption."""
    state = SamplingState(1, VOCAB, CPU)
    state.admit(sequence(0, [20], min_tokens=2, stop_ids=(7,), temperature=0.0))
    row = torch.zeros(1, VOCAB)
    row[:, 7], row[:, 9] = 3.0, 1.0
    assert [state.choose(row, [0], [position]).tolist() for position in (5, 6)] == [[9], [7]]


def test_a_grammar_masks_its_row_and_wins() -> None:
    state = SamplingState(2, VOCAB, CPU)
    state.admit(sequence(0, [], temperature=0.0))
    state.admit(sequence(1, [], min_tokens=9, stop_ids=(7,), temperature=0.0))
    row = torch.arange(VOCAB).float().expand(2, -1)
    mask = np.zeros((1, VOCAB), bool)
    mask[0, [7, 20]] = True
    assert state.choose(row, [0, 1], [4, 4], ([1], mask)).tolist() == [VOCAB - 1, 20]
    mask[0, 20] = False  # only the banned token is left
    assert state.choose(row, [0, 1], [4, 4], ([1], mask)).tolist() == [VOCAB - 1, 7]
    assert state.choose(row[:1], [0], [4], ([0], mask)).tolist() == [7]


@pytest.mark.parametrize(
    ("temperature", "value"), [(0.0, 0.0), (1e-9, 0.01), (0.5, 0.5), (1e38, 1e30)]
)
def test_temperature_is_bounded(temperature: float, value: float) -> None:
    state = SamplingState(1, VOCAB, CPU)
    state.admit(sequence(0, [], temperature=temperature))
    assert float(state._parameters.temperature[0]) == pytest.approx(value)


def test_only_what_is_used_is_computed() -> None:
    """Greedy rows need no table, and a top-k of the whole vocabulary is none."""
    state = SamplingState(1, VOCAB, CPU)
    tables = state._parameters
    state.admit(sequence(0, [], temperature=0.0, top_k=5, top_p=0.5, min_p=0.5, min_tokens=3))
    assert state._features.tolist() == [0, 0]  # the last is for padding
    assert (tables.in_text, tables.counts, tables.bias, tables.bans) == (None,) * 4
    state.admit(sequence(0, [], top_k=VOCAB))
    assert (state._features.tolist(), state._top_k.tolist()) == ([1, 0], [0, 0])
    state.admit(sequence(0, [], top_k=VOCAB - 1, top_p=0.5))
    assert (state._features.tolist(), state._top_k.tolist()) == ([1 | 2 | 4, 0], [VOCAB - 1, 0])
    state.admit(sequence(0, [], top_p=0.9999, min_p=1e-6))
    assert (state._features.tolist(), state._top_k.tolist()) == ([1 | 4 | 8 | 16, 0], [0, 0])


def test_a_cpu_samples_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_sampler = pytest.importorskip("nanochat_ray.engine.triton_sampler")
    monkeypatch.setattr(triton_sampler, "choose_by_slot", None)
    state = SamplingState(1, VOCAB, CPU)
    state.admit(sequence(0, []))
    assert len(state.choose(logits(1), [0], [4])) == 1
