"""Which rows of a step have log-probabilities, and where those of a prompt go."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanochat_ray.engine.logprobs import LogprobTable, PromptLogprobs
from nanochat_ray.engine.request import Request, SamplingParams, TokenLogprob
from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.sequence import Sequence

P = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.15, 0.05], [0.25, 0.45, 0.1, 0.2]])


def probabilities(entry: TokenLogprob | None) -> Any:
    """Probabilities, to two digits."""
    if entry is None:
        return None
    values = [(i, round(float(torch.tensor(value).exp()), 2)) for i, value in entry.top]
    return round(float(torch.tensor(entry.logprob).exp()), 2), values


@pytest.mark.parametrize(
    ("tops", "rows"),
    [
        ([None, None, None], []),
        ([None, 2, None], [None, (0.7, [(0, 0.7), (2, 0.15)]), None]),
        ([0, None, 1], [(0.4, []), None, (0.1, [(1, 0.45)])]),
        ([9, None, None], [(0.4, [(3, 0.4), (2, 0.3), (1, 0.2), (0, 0.1)]), None, None]),
    ],
)
def test_rows_by_hand(tops: list[int | None], rows: list[Any]) -> None:
    table = LogprobTable(P.log(), torch.tensor([3, 0, 2]), tops)
    assert [probabilities(entry) for entry in table.read()] == rows
    table.fetch()
    assert [probabilities(entry) for entry in table.read()] == rows


def prompt(
    tokens: list[int], start: int, missing: bool = True, top: int = 1, **fields: Any
) -> ScheduledChunk:
    params = SamplingParams(prompt_logprobs=top if missing else None)
    s = Sequence(Request(id="a", prompt=tokens, params=params), list(tokens), seed=0, max_length=9)
    s.prefill_spans, s.num_computed_tokens = [(0, len(tokens))], start
    one = TokenLogprob(logprob=0.0, top=[])
    s.prompt_logprobs = [one] * start if missing else None
    return ScheduledChunk.of(s, **fields)


def test_prompt_tokens_have_the_logits_before_them() -> None:
    """Behind a decode and an unscored prompt; the last chunk reaches the prompt's end."""
    decode = prompt([1], 0, missing=False, num_tokens=1, is_decode=True)
    plain = prompt([2, 3, 1, 0], 0, missing=False, num_tokens=2)
    middle = prompt([1, 3, 2, 0, 1], 1, num_tokens=2)
    end = prompt([2, 3, 1], 1, num_tokens=2)
    chunks = [decode, plain, middle, end]
    assert [chunk.num_logits for chunk in chunks] == [1, 0, 2, 2]
    logits = torch.stack([P[0], P[1], P[2], P[0], P[1]]).log()
    PromptLogprobs(chunks, logits).store()
    assert decode.sequence.prompt_logprobs is None
    middle_logprobs, end_logprobs = (
        chunk.sequence.prompt_logprobs or [] for chunk in (middle, end)
    )
    # Token 2 at position 2 and 0 at 3; then 1 at position 2: its last token has no next one.
    assert [probabilities(entry) for entry in middle_logprobs[1:]] == [
        (0.15, [(0, 0.7)]),
        (0.25, [(1, 0.45)]),
    ]
    assert [probabilities(entry) for entry in end_logprobs[1:]] == [(0.2, [(3, 0.4)])]


@pytest.mark.parametrize("top", [0, 2])
def test_prompt_tokens_have_as_many_alternatives_as_requested(top: int) -> None:
    chunk = prompt([1, 3, 2], 0, top=top, num_tokens=3)
    PromptLogprobs([chunk], P.log()).store()
    assert [probabilities(entry) for entry in chunk.sequence.prompt_logprobs or []] == [
        (0.4, [(3, 0.4), (2, 0.3)][:top]),
        (0.15, [(0, 0.7), (2, 0.15)][:top]),
    ]


def test_recomputed_logprobs_are_stored_once() -> None:
    chunk = prompt([1, 3, 2], 0, num_tokens=3)
    logprobs = chunk.sequence.prompt_logprobs
    assert logprobs is not None
    results = PromptLogprobs([chunk], P.log())
    results.store()
    first = list(logprobs)
    assert [probabilities(entry) for entry in first] == [(0.4, [(3, 0.4)]), (0.15, [(0, 0.7)])]
    results.store()
    assert logprobs == first
    chunk.sequence.prompt_logprobs = None  # finished in the meantime
    results.store()
