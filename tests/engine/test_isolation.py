"""One request that cannot be answered ends alone: the others of its step go on as they were."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch

from nanochat_ray.engine import sampler
from nanochat_ray.engine.grammar import MAX_CHARACTERS, Grammars, GrammarState
from nanochat_ray.engine.loop import EngineLoop
from nanochat_ray.engine.request import EngineFull, Request, RequestOutput
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tools import Tool
from tests.engine.engine_kit import VOCAB, ask, finish, make_engine, make_model, tokens
from tests.waiting import wait_for

TOK = Tokenizer.bytes_only()
BROKEN = 7
STEADY = {"temperature": 1.0, "seed": 5, "max_tokens": 40}


def rows(temperature: list[float], top_p: float = 1.0) -> sampler.Rows:
    n = len(temperature)
    return sampler.Rows(
        temperature=torch.tensor(temperature),
        top_k=torch.zeros(n, dtype=torch.int64),
        top_p=torch.full((n,), top_p, dtype=torch.float64),
        min_p=torch.zeros(n),
        seed=torch.arange(n),
        widest=0,
    )


@pytest.mark.parametrize("features", [0, sampler.SAMPLED, sampler.SAMPLED | sampler.TOP_P | 16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_row_that_is_not_finite_is_invalid(features: int, bad: float) -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    params = rows([1.0, 1.0, 1.0], 0.9)
    positions = torch.arange(3)
    want = sampler.choose(logits, params, positions, features).tolist()
    logits[1] = bad if bad < 0 else logits[1].index_fill(0, torch.tensor([4]), bad)
    actual = sampler.choose(logits, params, positions, features).tolist()
    assert actual == [want[0], sampler.INVALID, want[2]]


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-35, 1e-10, 1e-3, 0.01])
def test_low_temperatures_give_likeliest_token(temperature: float) -> None:
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(1)) * 30
    params = rows([max(temperature, sampler.MIN_TEMPERATURE)] * 4)
    token_ids = sampler.choose(logits, params, torch.arange(4), sampler.SAMPLED)
    assert token_ids.tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("async_scheduling", ["on", "off"])
@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_nan_ends_only_its_own_request(async_scheduling: str, layout: str) -> None:
    model = make_model.__wrapped__("classic")
    with torch.no_grad():
        model.transformer.wte.weight[BROKEN] = float("nan")
    fields = {
        "async_scheduling": async_scheduling,
        "kv_layout": layout,
        "num_speculative_tokens": 0,
    }
    alone = make_engine(copy.deepcopy(model), **fields)
    alone.add(ask("steady", [1, 2, 3], **STEADY))
    want = tokens(finish(alone)["steady"])
    engine = make_engine(model, **fields)
    engine.add(ask("steady", [1, 2, 3], **STEADY))
    for i, more in enumerate([{}, {"logprobs": 3}, {"temperature": 1.0, "prompt_logprobs": 2}]):
        engine.add(ask(f"bad{i}", [4, BROKEN, 5], **more))
    outputs = finish(engine)
    assert tokens(outputs["steady"]) == want
    for i in range(3):
        last = outputs[f"bad{i}"][-1]
        assert (last.finish, last.tokens) == ("error", [])
        assert last.error == "logits: they are not finite at position 3"
        assert last.prompt_logprobs is None
    engine.check_integrity()


def extreme(rng: random.Random, name: str) -> Request:
    choose = rng.choice
    return ask(
        name,
        [rng.randrange(VOCAB) for _ in range(rng.randint(1, 20))],
        temperature=choose([5e-324, 1e-38, 1e-35, 1e-5, 0.0, 2.0, 1e300]),
        top_p=choose([5e-324, 1e-38, 0.5, 1.0]),
        top_k=choose([0, 1, VOCAB, 2**31 - 1]),
        min_p=choose([0.0, 5e-324, 1.0]),
        repetition_penalty=choose([5e-324, 1e-38, 1.0, 1e38, 1e300]),
        presence_penalty=choose([-2.0, 0.0, 2.0]),
        frequency_penalty=choose([-2.0, 0.0, 2.0]),
        logit_bias={rng.randrange(VOCAB): choose([-100.0, 100.0]) for _ in range(5)},
        seed=choose([-(2**63), 2**64 - 1, 0]),
        logprobs=choose([None, 0, 20]),
        max_tokens=rng.randint(1, 8),
        eos_ids=(1,),
        min_tokens=choose([0, 1]),
    )


def test_extreme_requests_leave_a_stream_unchanged() -> None:
    rng = random.Random(0)
    engine = make_engine(make_model("modern"), max_num_seqs=6)
    engine.add(ask("steady", [1, 2, 3], **STEADY))
    want = tokens(finish(engine)["steady"])
    for round_ in range(12):
        engine.add(ask("steady", [1, 2, 3], **STEADY))
        for i in range(12):
            engine.add(extreme(rng, f"{round_}.{i}"))
        outputs = finish(engine)
        assert tokens(outputs.pop("steady")) == want
        assert all(o[-1].finish is not None for o in outputs.values())
    engine.check_integrity()


def test_grammar_panic_fails_only_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Matcher:
        def consume_tokens(self, tokens: list[int]) -> bool:
            raise PanicException("index out of bounds")

        def is_error(self) -> bool:
            return False

    engine = make_engine(make_model("classic"), token_bytes=TOK.byte_table())
    engine.add(ask("steady", [1], max_tokens=8))
    engine.add(ask("panics", [1], grammar={"regex": "[a-z]{20}"}))
    engine.step()
    state = next(s.grammar for s in engine.scheduler.running if s.grammar is not None)
    monkeypatch.setattr(
        GrammarState, "feed", lambda self, ids: _feed(self, Matcher(), ids), raising=True
    )
    outputs = finish(engine)
    assert state.failure == "PanicException: index out of bounds"
    assert outputs["panics"][-1].error == "grammar: PanicException: index out of bounds"
    assert outputs["steady"][-1].finish == "length"


def _feed(state: GrammarState, matcher: object, ids: list[int]) -> bool:
    with state.catch_errors():
        return bool(matcher.consume_tokens(ids))  # type: ignore[attr-defined]
    return False


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(TOK.byte_table(), TOK.vocab_size)


def nest(depth: int) -> dict[str, object]:
    schema: dict[str, object] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "grammar",
    [
        {"choice": [f"option {i}" for i in range(3000)]},
        {"choice": ["same"] * 3000},
        {"choice": ["a", "ab", "a|b", "(", "[x]", "\\", "<", "\n", '"', "é😀", "$^.*+?{}#&~-"]},
        {"json_schema": {"type": "object", "properties": {f"p{i}": {} for i in range(500)}}},
        {"json_schema": {"enum": list(range(5000))}},
    ],
)
def test_large_grammars_are_followed(grammars: Grammars, grammar: dict[str, object]) -> None:
    state = grammars.start(grammar, [TOK.bos])
    if "choice" in grammar:
        for text in grammar["choice"][-11:]:  # type: ignore[index]
            state = grammars.start(grammar, [TOK.bos], TOK.encode(text))
            assert state.error is None
            assert grammars.next_token_mask([(state, [])])[0, TOK.bos]
    for text in ('{"p499', "499"):
        state.feed(TOK.encode(text) if "json_schema" in grammar else [])
    for _ in range(3):
        assert grammars.next_token_mask([(state, [])]).any()


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ({"choice": ["x" * 80] * 2000}, f"{MAX_CHARACTERS:,} are allowed"),
        ({"json_schema": nest(130)}, "nested deeper"),
        ({"json_schema": {"$ref": "#"}}, "does not compile"),
        ({"json_schema": {"type": "integer", "minimum": 10**400}}, "does not compile"),
        ({"regex": "(" * 1000}, "does not compile"),
        ({"choice": ["\ud800"]}, "does not compile"),
    ],
)
def test_grammar_refusals_are_short(
    grammars: Grammars, grammar: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=f"^grammar: .*{words}") as error:
        grammars.check(grammar)
    assert len(str(error.value)) < 400


def test_large_grammars_do_not_delay_small_ones() -> None:
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    fields = {f"name of property {i}": {"type": "string"} for i in range(1200)}
    gate = threading.Event()
    hold_up = grammars._large.submit(gate.wait, 60)
    try:
        for i in range(32):
            grammars.compile({"json_schema": {"properties": fields, "title": str(i)}})
        grammars.check({"regex": "[a-z]+"})
        with pytest.raises(EngineFull, match="grammars=32"):
            grammars.compile({"json_schema": {"properties": fields, "title": "one more"}})
        assert not hold_up.done(), "the small one waited for the large ones"
    finally:
        grammars._large.shutdown(wait=False, cancel_futures=True)
        gate.set()


def test_tool_that_raises_fails_only_its_request() -> None:
    def run(ids: list[int]) -> list[int]:
        raise OSError("no tool today")

    tool = Tool(start=11, end=10, out_start=12, out_end=13, run=run)
    engine = make_engine(make_model("modern"), tool)
    engine.add(ask("steady", [1, 2], logit_bias={20: 100.0}))
    # It has begun its call already, and now ends it.
    engine.add(ask("bad", [1, 2], output_token_ids=[11], logit_bias={10: 100.0}))
    outputs = finish(engine)
    assert tokens(outputs["steady"]) == [20] * 16
    last = outputs["bad"][-1]
    assert (last.finish, last.error) == ("error", "OSError: no tool today")


class Panic(BaseException):
    """As pyo3's PanicException."""


@pytest.mark.parametrize("kind", [KeyError, Panic])
def test_loop_outlives_what_one_request_raises(
    kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    last_outputs: dict[str, RequestOutput] = {}
    engine = make_engine(make_model("modern"))
    loop = EngineLoop(
        engine, lambda outputs: last_outputs.update({o.request_id: o for o in outputs})
    )
    add = engine.add

    def adds(request: Request) -> None:
        if request.id == "bad":
            raise kind("odd")
        add(request)

    monkeypatch.setattr(engine, "add", adds)
    loop.start()
    loop.submit(ask("steady", [1, 2, 3], max_tokens=100))
    loop.submit(ask("bad", [1]))
    wait_for(lambda: "bad" in last_outputs and last_outputs["bad"].finish)
    assert "odd" in str(last_outputs["bad"].error)
    if kind is KeyError:
        wait_for(lambda: last_outputs["steady"].finish == "length")
    loop.submit(ask("next", [1]))
    wait_for(lambda: "next" in last_outputs and last_outputs["next"].finish == "length")
    assert loop.failure is None
    loop.stop()
