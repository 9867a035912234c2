"""The flat tokens of a step, and which of their logits are needed. No torch.

Legend: N tokens, S spans, R rows of logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nanochat_ray.engine.scheduler import ScheduledChunk
from nanochat_ray.engine.sequence import PLACEHOLDER


class StepInputs:
    """The tokens of a step, chunk by chunk: decodes first."""

    def __init__(self, chunks: Sequence[ScheduledChunk]):
        # Most chunks of most steps are decodes of one token, which come first.
        plain: list[ScheduledChunk] = []
        for chunk in chunks:
            if not chunk.is_plain_decode:
                break
            plain.append(chunk)
        starts = [(c.sequence.tokens, c.start) for c in plain]
        rows = [c.input_from_previous_step for c in plain]
        slots, positions = [c.sequence.slot for c in plain], [c.start for c in plain]
        self.source_rows = [-1 if row is None else row for row in rows]
        """Row of the previous step that samples the token, -1 where the host knows it."""
        self.token_ids = [
            tokens[start] if row is None else PLACEHOLDER
            for (tokens, start), row in zip(starts, rows, strict=True)
        ]
        self.previous_ids = [tokens[start - 1] if start else -1 for tokens, start in starts]
        """The token before each, of the same sequence; -1 where there is none."""
        self.logits_indices = list(range(len(plain)))
        """Tokens whose logits are needed."""
        self.logits_slots = slots.copy()
        """Their slots."""
        self.logits_positions = [position + 1 for position in positions]
        """Positions of the tokens behind them."""
        self._columns = (slots, positions, [1] * len(plain), [1] * len(plain))
        for chunk in chunks[len(plain) :]:
            self._add(chunk)
        self.spans_S4 = np.array(self._columns, dtype=np.int64).T
        """Rows as ``kvcache.base.Span``."""
        self.num_decodes = int(self.spans_S4[:, 3].sum())

    @property
    def placeholders(self) -> list[tuple[int, int]]:
        """Index of a token that the previous step samples, and its row there."""
        return [(i, row) for i, row in enumerate(self.source_rows) if row >= 0]

    @property
    def has_placeholders(self) -> bool:
        return max(self.source_rows, default=-1) >= 0

    def _add(self, chunk: ScheduledChunk) -> None:
        tokens, slot, start = chunk.sequence.tokens, chunk.sequence.slot, chunk.start
        row = chunk.input_from_previous_step
        self.previous_ids.append(tokens[start - 1] if start else -1)
        ids = [PLACEHOLDER] if row is not None else [*tokens[start : chunk.end], *chunk.draft]
        self.token_ids += ids
        self.previous_ids += ids[:-1]
        self.source_rows += [-1 if row is None else row] * len(ids)
        if chunk.is_decode:
            self._add_spans([(slot, start + i, 1, 1) for i in range(len(ids))])
        else:
            self._add_spans([(slot, start, chunk.num_tokens, 0)])
        first = len(ids) - chunk.num_logits
        self.logits_indices += range(len(self.token_ids) - chunk.num_logits, len(self.token_ids))
        self.logits_slots += [slot] * chunk.num_logits
        self.logits_positions += range(start + first + 1, start + len(ids) + 1)

    def _add_spans(self, spans: Sequence[tuple[int, int, int, int]]) -> None:
        for column, values in zip(self._columns, zip(*spans, strict=True), strict=True):
            column.extend(values)
