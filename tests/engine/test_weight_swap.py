"""New weights in a running engine: no answer mixes two checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.request import WEIGHTS_REPLACED, WeightsReplacedError
from nanochat_ray.model.gpt import GPT
from tests.engine.engine_kit import answer, ask, make_engine, make_model
from tests.engine.test_loop import Collector

PROMPT = list(range(1, 40))
"""Two blocks of the prefix cache and a part of a third."""


def other_weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = make_model("modern").state_dict()
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()}


def tokens_of(weights: dict[str, torch.Tensor], max_tokens: int) -> list[int]:
    model = GPT(make_model("modern").config)
    model.load_state_dict(weights)
    return answer(make_engine(model.eval()), ask("r", PROMPT, max_tokens=max_tokens))


@pytest.fixture
def loop() -> Iterator[tuple[EngineLoop, Collector]]:
    collector = Collector()
    engine = make_engine(make_model("modern"), max_num_seqs=2)
    engine.weight_version = "a"
    engine_loop = EngineLoop(engine, collector)
    engine_loop.start()
    yield engine_loop, collector
    engine_loop.stop()
    engine.check_integrity()


def version(out: Collector, name: str) -> str:
    return out.results[name][0].weight_version


def test_answers_never_mix_weights(loop: tuple[EngineLoop, Collector]) -> None:
    """Two run, four wait, four arrive during the swap."""
    engine, out = loop
    new = other_weights(1)
    reference = {"a": tokens_of(make_model("modern").state_dict(), 60), "b": tokens_of(new, 60)}
    assert reference["a"] != reference["b"]
    names = [str(i) for i in range(10)]
    for name in names[:6]:
        engine.submit(ask(name, PROMPT, max_tokens=60))
    with out.pause_when(lambda: {"0", "1"} <= out.results.keys()):
        completion = engine.swap_weights(new, "b", drain_s=60)
        for name in names[6:]:
            engine.submit(ask(name, PROMPT, max_tokens=60))
    completion.result(30)
    assert engine.weight_version == "b"
    out.wait(lambda: all(out.ends(name) for name in names))
    assert [version(out, name) for name in names] == ["a"] * 2 + ["b"] * 8
    for name in names:
        assert out.tokens(name) == reference[version(out, name)]


def test_drain_is_bounded(loop: tuple[EngineLoop, Collector]) -> None:
    engine, out = loop
    new = other_weights(1)
    reference = tokens_of(new, 8)
    for name in ("0", "1"):
        engine.submit(ask(name, PROMPT, max_tokens=80))
    with out.pause_when(lambda: {"0", "1"} <= out.results.keys()):
        engine.submit(ask("2", PROMPT, max_tokens=8))
        completion = engine.swap_weights(new, "b", drain_s=0)
    completion.result(30)
    out.wait(lambda: all(out.ends(name) for name in "012"))
    assert [out.ends(name) for name in "012"] == [["error"], ["error"], ["length"]]
    for name in "01":
        error = out.results[name][-1].error or ""
        assert error.startswith(f"{WEIGHTS_REPLACED} a was replaced by b")
    assert out.tokens("2") == reference


def test_an_answer_keeps_its_weights(loop: tuple[EngineLoop, Collector]) -> None:
    """A request that belongs to an answer of the old weights is accepted until these are gone."""
    engine, out = loop
    old = dataclasses.replace(ask("1", PROMPT, max_tokens=4), weight_version="a")
    engine.submit(ask("0", PROMPT, max_tokens=80))
    with out.pause_when(lambda: "0" in out.results):
        completion = engine.swap_weights(other_weights(1), "b", drain_s=60)
        engine.submit(old)
    completion.result(30)
    assert (version(out, "1"), out.ends("1")) == ("a", ["length"])
    with pytest.raises(WeightsReplacedError, match=r"a is not served any more, but b"):
        engine.submit(dataclasses.replace(old, id="2"))


def test_requests_abort_while_they_wait(loop: tuple[EngineLoop, Collector]) -> None:
    engine, out = loop
    engine.submit(ask("0", PROMPT, max_tokens=80))
    with out.pause_when(lambda: "0" in out.results):
        engine.swap_weights(other_weights(1), "b", drain_s=60)
        engine.submit(ask("1", PROMPT, max_tokens=4))
        engine.abort("1")
    out.wait(lambda: bool(out.ends("1")))
    assert out.ends("1") == ["abort"]
    assert out.tokens("1") == []


def test_a_swap_keeps_the_order_of_arrival() -> None:
    """Those that waited in the engine come before those that arrived later."""
    engine = make_engine(make_model("modern"), max_num_seqs=1)
    loop = EngineLoop(engine, lambda outputs: None)
    for name in ("runs", "first", "second"):
        engine.add(ask(name, PROMPT))
    engine.step()
    loop.swap_weights(other_weights(1), "b", drain_s=60)
    loop.submit(ask("third", PROMPT))
    assert loop._advance_swap() == []
    assert [request.id for request, _ in loop._inbox] == ["first", "second", "third"]


def test_a_swap_waits_for_requests_of_the_old_weights() -> None:
    """One that arrives when the engine is idle, but for which no step has run yet."""
    engine = make_engine(make_model("modern"))
    engine.weight_version = "a"
    loop = EngineLoop(engine, lambda outputs: None)
    completion = loop.swap_weights(other_weights(1), "b", drain_s=60)
    loop.submit(dataclasses.replace(ask("old", PROMPT), weight_version="a"))
    assert loop._advance_swap() == []
    assert loop.is_swapping
    assert loop._take_inbox()[0][0].id == "old"
    loop._advance_swap()
    assert (completion.done(), engine.weight_version) == (True, "b")


def test_a_swap_happens_though_nobody_waits_for_it(loop: tuple[EngineLoop, Collector]) -> None:
    """A task that awaits the future may be cancelled, and cancels the future."""
    engine, out = loop
    engine.submit(ask("0", PROMPT, max_tokens=80))
    with out.pause_when(lambda: "0" in out.results):
        completion = engine.swap_weights(other_weights(1), "b", drain_s=60)
        completion.cancel()
        engine.submit(ask("1", PROMPT, max_tokens=4))
    out.wait(lambda: bool(out.ends("1")))
    assert (out.ends("0"), out.ends("1"), version(out, "1")) == (["length"], ["length"], "b")


def test_wrong_weights_change_nothing(loop: tuple[EngineLoop, Collector]) -> None:
    engine, _ = loop
    weights = make_model("modern").state_dict()
    weights["transformer.wte.weight"] = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight has the shape"):
        engine.swap_weights(weights, "b", drain_s=60)
    assert (engine.weight_version, engine.is_swapping) == ("a", False)


def test_one_swap_at_a_time(loop: tuple[EngineLoop, Collector]) -> None:
    engine, out = loop
    engine.submit(ask("0", PROMPT, max_tokens=80))
    with out.pause_when(lambda: "0" in out.results):
        engine.swap_weights(other_weights(1), "b", drain_s=60)
        with pytest.raises(RuntimeError, match="still loading b"):
            engine.swap_weights(other_weights(2), "c", drain_s=60)
    engine.stop()
