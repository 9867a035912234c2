"""One forward of the model for one plan of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanochat_ray.config import Precision
from nanochat_ray.engine.kv_cache import MIN_ROWS, SlotCache, Span
from nanochat_ray.engine.scheduler import Chunk
from nanochat_ray.model.gpt import GPT

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Gate(nn.Module):
    """A linear layer of few outputs, computed as one of more.

    A matrix of one row has kernels of its own, whose sums depend on the number of rows of ``x``.
    And a slice of a wider result is not contiguous: a contiguous one would go through torch's
    sigmoid by vectors of 16 with another formula for what is left over, so that a row's gate
    would depend on its place in the batch.
    """

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        wide = torch.zeros(layer.out_features // 8 * 8 + 8, layer.in_features)
        wide = wide.to(layer.weight.device, layer.weight.dtype)
        wide[: layer.out_features] = layer.weight.data
        self.weight = nn.Parameter(wide.t().contiguous().t(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)[..., : self.out_features]


def lay_out(model: nn.Module) -> None:
    """Makes linear layers treat each row by itself, to the bit, and faster; values stay.

    Weights are stored column by column: MKL then multiplies 4 to 16 rows up to 1.8 times faster,
    and, what is more, a row's result is the same to the bit with 2 rows or 272. Stored row by
    row, it changes at 16 rows.
    """
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if not isinstance(layer, nn.Linear):
                continue
            if layer.out_features < 32:
                setattr(parent, name, Gate(layer))
            else:
                layer.weight.data = layer.weight.data.t().contiguous().t()


class Runner:
    """Holds the model and its cache. Takes the model over: dtype and memory layout may change."""

    def __init__(self, model: GPT, slots: int, max_len: int, precision: Precision):
        dtype = DTYPES[precision]
        self.model = model.to(dtype).eval()
        model.compute_dtype = dtype
        self.device = model.lm_head.weight.device
        if self.device.type == "cpu":
            lay_out(model)
        self.cache = SlotCache(model.config, slots, max_len, dtype, self.device)

    @torch.inference_mode()
    def run(self, chunks: SequenceOf[Chunk]) -> Tensor:
        """float32 logits ``[R, V]`` after those rows of each chunk that it wants (its last
        ``Chunk.rows``), chunk by chunk."""
        ids: list[int] = []
        before: list[int] = []
        spans: list[Span] = []
        last: list[int] = []
        for chunk in chunks:
            tokens, slot, start = chunk.sequence.tokens, chunk.sequence.slot, chunk.start
            if chunk.decode:
                count = chunk.count + len(chunk.draft)
                spans += [Span(slot, start + i, 1, True) for i in range(count)]
            else:
                spans.append(Span(slot, start, chunk.count, False))
            before.append(tokens[start - 1] if start else -1)
            if chunk.count == 1:
                ids.append(tokens[start])
            else:
                ids += tokens[start : start + chunk.count]
                before += tokens[start : start + chunk.count - 1]
            if chunk.draft:
                before += [tokens[-1], *chunk.draft[:-1]]
                ids += chunk.draft
            last += range(len(ids) - chunk.rows, len(ids))
        rows = self.cache.begin(spans)
        table = np.zeros((2, rows), dtype=np.int64)
        table[0, : len(ids)], table[1, : len(ids)] = ids, before
        ids_N, before_N = torch.from_numpy(table).to(self.device)
        hidden = self.model.hidden(ids_N[:, None], self.cache, before_N)[:, 0]
        if not last:
            return hidden.new_empty((0, self.model.config.vocab_size), dtype=torch.float32)
        if last != list(range(rows)):
            wanted = last + [last[0]] * (MIN_ROWS - len(last))
            hidden = hidden[torch.tensor(wanted, device=self.device)]
        return self.model.logits(hidden)[: len(last)]
