"""The gradient of an embedding table by the kernel, in Triton's interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nanochat_ray.model import embedding

pytest.importorskip("triton")
from nanochat_ray.model import triton_embedding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("vocab", "C", "chunk"), [(7, 24, 128), (300, 16, 128), (5, 20, 8)])
def test_gradient_of_a_table_equals_float64(
    vocab: int, C: int, chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 7 ids some occur in more than a tile; of 300 many do not occur; of 5 each has chunks."""
    monkeypatch.setattr(triton_embedding, "CHUNK", chunk)
    monkeypatch.setattr(embedding, "use_triton", lambda device: True)
    generator = torch.Generator().manual_seed(vocab)
    ids = torch.randint(vocab, (3, 50), generator=generator).to(DEVICE)
    table = torch.randn(vocab, C, generator=generator).to(DEVICE)
    weights = torch.randn(3, 50, C, generator=generator).to(DEVICE, dtype)
    results = []
    for order in (None, embedding.token_order(ids, vocab)):
        rows = (table.double() if order is None else table).clone().requires_grad_()
        output = embedding.embed(rows, ids, order, torch.float64 if order is None else dtype)
        (output * weights).sum().backward()
        results.append((output, rows.grad))
    (exact_output, exact), (output, grad) = results
    assert torch.equal(output, exact_output.to(dtype))
    assert grad is not None
    assert grad.dtype == torch.float32
    assert exact is not None
    # Sums of at most 50 of the values, which are below 5.
    assert (grad - exact).abs().max() <= 50 * 5 * torch.finfo(torch.float32).eps


def test_order_lists_the_positions_of_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.tensor([[2, 0], [2, 5]])
    assert embedding.token_order(ids, 6) is None
    monkeypatch.setattr(embedding, "use_triton", lambda device: True)
    order = embedding.token_order(ids, 6)
    assert order is not None
    tokens, starts = order.positions
    assert tokens.tolist() == [1, 0, 2, 3]
    assert starts.tolist() == [0, 1, 1, 3, 3, 3, 4]
    with torch.no_grad():
        assert embedding.token_order(ids, 6) is None


def test_a_table_on_a_cpu_is_torchs() -> None:
    table = torch.randn(5, 4)
    ids = torch.tensor([[1, 4]])
    assert torch.equal(embedding.embed(table, ids, None, torch.float32), F.embedding(ids, table))
