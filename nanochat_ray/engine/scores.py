"""Log-probabilities that requests ask for, computed for all of a step's rows at once."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from nanochat_ray.engine import sampler
from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.engine.scheduler import Chunk, Sequence


def score(
    logits: Tensor, rows: SequenceOf[int], tokens: SequenceOf[int], tops: SequenceOf[int]
) -> list[TokenLogprob]:
    """For each of ``rows`` of float32 ``logits [R, V]``: the token given, and its ``tops``
    likeliest ones."""
    if not rows:
        return []
    at = torch.tensor(rows, device=logits.device)
    chosen = torch.tensor(tokens, device=logits.device)
    top = min(max(tops), logits.size(-1))
    own, ids, values = (t.tolist() for t in sampler.log_probabilities(logits[at], chosen, top))
    return [
        TokenLogprob(logprob=own[i], top=list(zip(ids[i][:n], values[i][:n], strict=True)))
        for i, n in enumerate(tops)
    ]


def score_chosen(
    chunks: SequenceOf[Chunk], logits: Tensor, chosen: SequenceOf[int]
) -> list[TokenLogprob | None]:
    """For each row of ``logits [R, V]``, one for each chunk and one more for each guess of its
    draft: None where nobody asked; an empty list if nobody did at all."""
    tops = [c.sequence.request.params.logprobs for c in chunks for _ in (0, *c.draft)]
    asked = [i for i, top in enumerate(tops) if top is not None]
    if not asked:
        return []
    found = score(logits, asked, [chosen[i] for i in asked], [tops[i] or 0 for i in asked])
    by_row = dict(zip(asked, found, strict=True))
    return [by_row.get(i) for i in range(len(tops))]


def score_prompts(chunks: SequenceOf[Chunk], logits: Tensor) -> None:
    """Adds to the ``prompt_scores`` of sequences what ``logits [R, V]`` of the chunks tell."""
    rows, tokens, tops = [], [], []
    owners: list[Sequence] = []
    row = 0
    for chunk in chunks:
        s = chunk.sequence
        if chunk.scores and s.prompt_scores is not None:
            prompt = s.request.prompt
            # The row of each token tells of the one behind it; some may be known since before a
            # preemption.
            first = max(chunk.start, len(s.prompt_scores))
            for place in range(first, min(chunk.start + chunk.count, len(prompt) - 1)):
                rows.append(row + place - chunk.start)
                tokens.append(prompt[place + 1])
                tops.append(s.request.params.prompt_logprobs or 0)
                owners.append(s)
        row += chunk.rows
    for owner, found in zip(owners, score(logits, rows, tokens, tops), strict=True):
        assert owner.prompt_scores is not None
        owner.prompt_scores.append(found)
