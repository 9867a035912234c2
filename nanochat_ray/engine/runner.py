"""One forward of the model for one plan of the scheduler."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.config import Precision
from nanochat_ray.engine.kv_cache import SlotCache, Span
from nanochat_ray.engine.linear import lay_out
from nanochat_ray.engine.scheduler import Chunk
from nanochat_ray.model.gpt import GPT

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Runner:
    """Holds the model and its cache. Takes the model over: dtype and memory layout may change."""

    def __init__(self, model: GPT, slots: int, max_len: int, precision: Precision):
        dtype = DTYPES[precision]
        self.model = model.to(dtype).eval()
        model.compute_dtype = dtype
        self.device = model.wte.weight.device
        self.min_rows = lay_out(model) if self.device.type == "cpu" else 1
        self.cache = SlotCache(model.config, slots, max_len, dtype, self.device, self.min_rows)

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
            before.append(tokens[start - 1] if start else -1)
            if chunk.count == 1 and not chunk.draft:
                spans.append(Span(slot, start, 1, chunk.decode))
                ids.append(tokens[start])
            else:
                run = tokens[start : start + chunk.count] + list(chunk.draft)
                ids += run
                before += run[:-1]
                if chunk.decode:  # each row by itself, to the same bits as one by one
                    spans += [Span(slot, start + i, 1, True) for i in range(len(run))]
                else:
                    spans.append(Span(slot, start, chunk.count, False))
            last += range(len(ids) - chunk.rows, len(ids))
        rows = self.cache.begin(spans)
        table = np.zeros((2, rows), dtype=np.int64)
        table[0, : len(ids)], table[1, : len(ids)] = ids, before
        ids_N, before_N = torch.from_numpy(table).to(self.device)
        hidden = self.model.hidden(ids_N[:, None], self.cache, before_N)[:, 0]
        if not last:
            return hidden.new_empty((0, self.model.config.vocab_size), dtype=torch.float32)
        if last != list(range(rows)):
            wanted = last + [last[0]] * (self.min_rows - len(last))
            hidden = hidden[torch.tensor(wanted, device=self.device)]
        return self.model.logits(hidden)[: len(last)]
