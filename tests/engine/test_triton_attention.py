"""Paged attention in Triton against float64, in the interpreter where there is no GPU."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
from nanochat_ray.engine import triton_attention
from nanochat_ray.engine.kvcache.attention_metadata import tile_tokens
from nanochat_ray.engine.triton_attention import paged_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Step:
    """New tokens of sequences of ``lengths`` tokens each, whose blocks are in random order."""

    def __init__(
        self,
        counts: list[int],
        lengths: list[int],
        heads: int,
        kv_heads: int,
        D: int,
        **kind: object,
    ):
        generator = torch.Generator().manual_seed(sum(lengths))
        block = 16
        per_sequence = [-(-length // block) for length in lengths]
        order = torch.randperm(sum(per_sequence), generator=generator).tolist()
        self.table = torch.zeros((len(lengths), max(per_sequence)), dtype=torch.int32)
        for i, blocks in enumerate(per_sequence):
            self.table[i, :blocks] = torch.tensor([order.pop() for _ in range(blocks)])
        shape = (sum(per_sequence), block, kv_heads, D)
        self.keys = torch.randn(shape, generator=generator).to(**kind)  # type: ignore[call-overload]
        self.values = torch.randn(shape, generator=generator).to(**kind)  # type: ignore[call-overload]
        self.q = torch.randn((sum(counts), heads, D), generator=generator).to(**kind)  # type: ignore[call-overload]
        self.counts, self.lengths = counts, lengths

    def run(self, window: int, only: int | None = None) -> Tensor:
        """The output of all sequences, or of one in a step of its own."""
        indices = list(range(len(self.counts))) if only is None else [only]
        bounds = [0]
        for count in self.counts:
            bounds.append(bounds[-1] + count)
        q = torch.cat([self.q[bounds[i] : bounds[i + 1]] for i in indices])
        tiles, first = list[list[int]](), 0
        size = tile_tokens(self.q.size(1) // self.keys.size(2))
        for span, i in enumerate(indices):
            count, start = self.counts[i], self.lengths[i] - self.counts[i]
            for at in range(0, count, size):
                tiles.append([span, first + at, min(size, count - at), start + at])
            first += count
        # Decodes come first.
        tiles.sort(key=lambda tile: self.counts[indices[tile[0]]] > 1)
        num_decodes = sum(self.counts[i] == 1 for i in indices)
        tiles.insert(num_decodes, [0, 0, 0, 0])  # empty ones
        tiles.insert(num_decodes, [0, 0, 0, 0])
        return paged_attention(
            *(t.to(DEVICE) for t in (q, self.keys, self.values)),
            torch.tensor(tiles, dtype=torch.int32, device=DEVICE),
            self.table[list(indices)].to(DEVICE),
            num_decodes=num_decodes + 1,
            max_seqlen_k=max(self.lengths) + 100,
            window=window,
        ).cpu()

    def exact(self, window: int) -> Tensor:
        """The same in float64, one token at a time."""
        bounds = [0]
        for count in self.counts:
            bounds.append(bounds[-1] + count)
        G = self.q.size(1) // self.keys.size(2)
        rows = []
        for i, (first, last) in enumerate(pairwise(bounds)):
            k, v = (
                cache[self.table[i].long()].flatten(0, 1).double().repeat_interleave(G, dim=1)
                for cache in (self.keys, self.values)
            )
            for n in range(first, last):
                position = self.lengths[i] - last + n
                low = max(0, position - window) if window >= 0 else 0
                scores = torch.einsum("hd,khd->hk", self.q[n].double(), k[low : position + 1])
                weights = (scores / self.q.size(2) ** 0.5).softmax(dim=-1)
                rows.append(torch.einsum("hk,khd->hd", weights, v[low : position + 1]))
        return torch.stack(rows)


CASES = {
    "decode": ([1, 1, 1], [1, 40, 97]),
    "prefill": ([5, 33], [5, 70]),
    "mixed": ([1, 20, 1], [50, 20, 3]),
    "many splits": ([1, 1], [300, 1]),
}


@pytest.mark.parametrize("window", [-1, 7, 100])
@pytest.mark.parametrize(("heads", "kv_heads", "D"), [(4, 4, 16), (6, 2, 24)])
@pytest.mark.parametrize("case", CASES)
def test_paged_attention_equals_float64(
    case: str, heads: int, kv_heads: int, D: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_attention, "SPLIT", 64)
    monkeypatch.setattr(triton_attention, "MERGE", 2)
    step = Step(*CASES[case], heads, kv_heads, D, dtype=torch.float32)
    error = (step.run(window).double() - step.exact(window)).abs().max()
    # Scores of D terms and weights of up to 300 keys, of values of about 4 at most.
    assert error <= 300 * torch.finfo(torch.float32).eps * 4


def test_paged_attention_in_half_precision() -> None:
    # Triton's interpreter multiplies the bits of bfloat16 (3.9), so that only a GPU can have it.
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    step = Step([1, 9], [60, 30], 4, 2, 16, dtype=dtype)
    error = (step.run(-1).double() - step.exact(-1)).abs().max()
    # The weights and the output are rounded, of values of about 4 at most.
    assert error <= 3 * torch.finfo(dtype).eps * 4


@pytest.mark.parametrize("case", CASES)
def test_company_does_not_change_a_row(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_attention, "SPLIT", 64)
    step = Step(*CASES[case], 6, 2, 16, dtype=torch.float32)
    together = step.run(-1)
    for i, alone in enumerate(step.run(-1, only=i) for i in range(len(step.counts))):
        first = sum(step.counts[:i])
        assert torch.equal(together[first : first + step.counts[i]], alone)


@pytest.mark.parametrize("case", ["decode", "mixed"])
def test_paged_attention_of_fp8_pages(case: str) -> None:
    """Equal to attention over the rounded keys and values; near to that over exact ones."""
    step = Step(*CASES[case], 4, 2, 16, dtype=torch.float32)
    exact = step.exact(-1)
    step.keys, step.values = (t.to(torch.float8_e4m3fn) for t in (step.keys, step.values))
    output = step.run(-1).double()
    step.keys, step.values = step.keys.float(), step.values.float()
    reference = step.exact(-1)
    assert (output - reference).abs().max() <= 100 * torch.finfo(torch.float32).eps * 4
    # Rounded by 2^-4 of their size: keys move a score by so much of Σ|q·k| / √D, and weights by as
    # much again; a value moves the output by so much.
    G = step.q.size(1) // step.keys.size(2)
    sizes = [step.keys.abs().repeat_interleave(G, 2).amax((0, 1)), step.q.abs().amax(0)]
    scores = (sizes[0] * sizes[1]).sum(-1).max() / 4
    most = 2.0**-4 * (1 + 2 * float(scores)) * float(step.values.abs().max())
    assert 0 < (reference - exact).abs().max() <= most
