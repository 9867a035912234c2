"""What torch.compile sees of the model, on a CPU: how many graphs, and no falling back to none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex_module
from torch._dynamo.utils import counters

from nanochat_ray.model import attention, gpt
from nanochat_ray.model.gpt import GPT
from tests.tiny import tiny_config

T = 192
AROUND = 2
"""Graphs of what is before and after the layers."""
# The compiler warns of other parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def flex_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The attention of a GPU, with its gradient, which FlexAttention refuses on a CPU."""

    def with_flex(*args: Any, flex: bool) -> Any:
        return attention.attention_mask(*args, flex=True)

    monkeypatch.setattr(gpt, "attention_mask", with_flex)
    monkeypatch.setattr(flex_module, "_validate_device", lambda *args: None)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_module.flex_attention)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Counter:
    """A backend that counts graphs and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return module.forward


def build(n_layer: int = 2, **fields: Any) -> GPT:
    model = GPT(tiny_config(n_layer=n_layer, sequence_len=T, **fields))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05
    return model


def step(model: GPT) -> torch.Tensor:
    """The loss of a forward pass; leaves gradients."""
    ids = torch.randint(0, 256, (2, T + 1), generator=torch.Generator().manual_seed(1))
    model.zero_grad()
    loss = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    return loss.detach()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_compiled_layers_equal_eager_ones(recompute: bool) -> None:
    eager_model, model = (build(window_pattern="SL", document_start=3) for _ in range(2))
    backend = Counter()
    model.compile_blocks(backend)
    model.checkpoint_activations = recompute
    assert torch.equal(step(eager_model), step(model))
    for name, parameter in eager_model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)
    # With and without value embeddings. A side effect in a layer would leave it uncompiled.
    assert backend.graphs == 2 + AROUND
    assert not counters["graph_break"]
    assert not counters["unimplemented"]


@pytest.mark.slow
def test_depth_adds_no_graphs() -> None:
    backend = Counter()
    model = build(6, window_pattern="SL")
    model.compile_blocks(backend)
    for _ in range(2):
        step(model)
    # Windows and value embeddings: odd layers have both kinds of one, even ones of the other.
    assert backend.graphs == 2 + AROUND
    with torch.no_grad():
        model.eval()(torch.zeros((2, T), dtype=torch.int64))
    assert backend.graphs == 2 * (2 + AROUND)  # validation has no gradients


@pytest.mark.slow
@pytest.mark.parametrize("documents", [-1, 3])
def test_a_window_schedule_adds_no_graphs(documents: int) -> None:
    backend = Counter()
    model = build(window_pattern="SL", document_start=documents)
    model.compile_blocks(backend)
    for share in (0.25, 0.5, 0.75):
        model.window_share = share
        step(model)
    assert backend.graphs == 2 + AROUND
    model.window_share = 1.0
    step(model)
    # Whole windows without documents need no mask.
    assert backend.graphs == (2 if documents >= 0 else 3) + AROUND


@pytest.mark.slow
def test_one_flex_attention_for_all_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Counter()
    flex = torch.compile(flex_module.flex_attention, dynamic=False, backend=backend)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex)
    model = build(window_pattern="SL", document_start=3)
    for share in (0.25, 0.5, 0.75, 1.0):
        model.window_share = share
        step(model)
    assert backend.graphs == 1


def test_beyond_the_limit_nothing_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(n_layer=1)
    monkeypatch.setattr(torch._inductor.config, "deterministic", False)
    model.compile_blocks(Counter())
    assert torch._inductor.config.deterministic
    assert torch._dynamo.config.recompile_limit == 64
    limit = torch._dynamo.config.patch(recompile_limit=2)
    with limit, torch.no_grad():
        for length in (2, 3):
            model.hidden(torch.zeros((1, length), dtype=torch.int64))
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            model.hidden(torch.zeros((1, 4), dtype=torch.int64))
