"""Answers that follow a grammar, over one token for each byte."""

from __future__ import annotations

import dataclasses
import gc
import json
import random
import re
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch

from nanochat_ray.engine import grammar as grammar_module
from nanochat_ray.engine import sampler
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.grammar import MAX_CACHED, Grammars
from nanochat_ray.engine.request import EngineFull, Request, RequestOutput
from nanochat_ray.text.tokenizer import Tokenizer
from tests.engine.engine_kit import VOCAB, answer, ask, finish, make_engine, make_model, tokens
from tests.waiting import wait_for

TOK = Tokenizer.bytes_only()
END = TOK.bos
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "ages": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 2},
        "kind": {"enum": ["cat", "dög"]},
    },
    "required": ["name", "ages", "kind"],
    "additionalProperties": False,
}
GRAMMARS: list[dict[str, Any]] = [
    {"json_schema": SCHEMA},
    {"regex": r"[a-c]{2,5}(-[0-9]{2})?"},
    {"choice": ["yes", "no", "nö", 'say "x"']},
    {"lark": 'start: "(" (start | /[xy]/) ")"'},
]


def engine(**fields: Any) -> Engine:
    return make_engine(make_model("modern"), token_bytes=TOK.byte_table(), **fields)


def request(name: str, grammar: Mapping[str, Any], **params: Any) -> Request:
    settings = {"temperature": 1.0, "seed": 3, "max_tokens": 100, "eos_ids": (END,)} | params
    return ask(name, [ord("a"), ord("b")], grammar=grammar, **settings)


def text(outputs: list[RequestOutput]) -> str:
    assert outputs[-1].finish == "stop"
    output_ids = tokens(outputs)
    return TOK.decode(output_ids[:-1] if outputs[-1].last_token_is_stop else output_ids)


def follows(grammar: Mapping[str, Any], output_text: str) -> bool:
    ((kind, value),) = grammar.items()
    if kind == "json_schema":
        jsonschema.validate(json.loads(output_text), value)
        return True
    if kind == "regex":
        return re.fullmatch(value, output_text) is not None
    if kind == "choice":
        return output_text in value
    depth = (len(output_text) - 1) // 2
    return output_text in ("(" * depth + x + ")" * depth for x in "xy")


def test_outputs_follow_their_grammars() -> None:
    workload = [
        request(f"{i}-{seed}", grammar, seed=seed, temperature=[0.0, 1.0, 2.0][seed % 3])
        for i, grammar in enumerate(GRAMMARS)
        for seed in range(6)
    ]
    free = ask("free", [1, 2, 3], max_tokens=30)
    want = answer(make_engine(make_model("modern")), free)
    busy = engine(max_num_seqs=7, max_num_batched_tokens=40)
    for each in [*workload[:9], free, *workload[9:]]:
        busy.add(each)
    results = finish(busy)
    assert tokens(results.pop("free")) == want
    for each in workload:
        assert each.params.grammar is not None
        outputs = results[each.id]
        if outputs[-1].finish == "length":  # nested without end
            assert "lark" in each.params.grammar
        else:
            output_text = text(outputs)
            assert follows(each.params.grammar, output_text), output_text
    flags = {o.complete for outputs in results.values() for o in outputs if o.finish == "stop"}
    assert flags == {True, False}


def test_json_object_is_json() -> None:
    # Bytes that would open strings and nests without end are made unlikely.
    bias = {ord(c): b for c, b in [("}", 30.0), ('"', 20.0), (":", 5.0)]}
    outputs = engine()
    outputs.add(request("r", {"json_object": True}, logit_bias=bias))
    assert isinstance(json.loads(text(finish(outputs)["r"])), dict)


def test_grammar_tokens_do_not_depend_on_batch() -> None:
    workload = [request(f"r{i}", grammar) for i, grammar in enumerate(GRAMMARS)]
    alone = {r.id: answer(engine(max_num_seqs=1), r) for r in workload}
    rng, shaken = (
        random.Random(0),
        engine(max_num_seqs=3, max_num_batched_tokens=5, prefill_chunk=2),
    )
    for each in workload:
        shaken.add(each)
    results: dict[str, list[RequestOutput]] = {}
    while shaken.has_work:
        for output in shaken.step():
            results.setdefault(output.request_id, []).append(output)
        running = [s.request.id for s in shaken.scheduler.running]
        if running and rng.random() < 0.2:
            shaken.preempt(rng.choice(running))
    assert {k: tokens(v) for k, v in results.items()} == alone
    other = engine()
    for each in workload:
        whole = alone[each.id]
        for cut in range(1, len(whole), 3):
            later = dataclasses.replace(each, id=f"{each.id}-{cut}", output_token_ids=whole[:cut])
            assert whole[:cut] + answer(other, later) == whole
    flags = dataclasses.replace(workload[0], output_token_ids=alone["r0"])
    other.add(flags)
    (last,) = other.step()
    assert (last.tokens, last.finish, last.complete) == ([], "stop", True)


def test_grammar_overrides_min_tokens_and_tool() -> None:
    short = engine()
    short.add(request("r", {"choice": ["a"]}, min_tokens=20))
    assert text(finish(short)["r"]) == "a"
    # Only the end is left after "ab", which min_tokens bans: nothing would be left.
    short.add(request("s", {"regex": "ab?"}, min_tokens=20, logit_bias={ord("b"): -100.0}))
    assert text(finish(short)["s"]) == "ab"


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ({"regex": "("}, "regex.*unclosed group"),
        ({"regex": "(?!)"}, "regex"),
        ({"lark": "start: other"}, "lark.*other"),
        ({"lark": 'start: ""'}, "lark allows no text"),
        ({"json_schema": {"type": "nonsense"}}, "json_schema.*nonsense"),
        ({"json_schema": {"$ref": "http://example.com/x"}}, "json_schema"),
    ],
)
def test_grammar_that_does_not_compile_is_rejected(grammar: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^grammar: this {words}"):
        engine().validate(request("r", grammar))


@pytest.mark.parametrize(
    "grammar",
    [
        {},
        {"regex": "a", "lark": "b"},
        {"gbnf": "a"},
        {"regex": ""},
        {"regex": 5},
        {"choice": []},
        {"choice": ["a", ""]},
        {"choice": "ab"},
        {"json_object": False},
        {"json_schema": "{}"},
        "regex",
    ],
)
def test_malformed_grammar_is_rejected(grammar: Any) -> None:
    with pytest.raises(ValueError, match=r"^grammar"):
        request("r", grammar)


def test_unusable_grammar_requests_are_rejected() -> None:
    workload = request("r", {"choice": ["yes"]})
    with pytest.raises(ValueError, match=r"^grammar"):
        make_engine(make_model("modern")).add(workload)
    with pytest.raises(ValueError, match=r"^output_token_ids"):
        engine().add(dataclasses.replace(workload, output_token_ids=[ord("n")]))
    with pytest.raises(ValueError, match=r"^token_bytes has 301"):
        Grammars([b"a"] * 301, 300)


def test_grammars_survive_the_wire() -> None:
    for grammar in GRAMMARS:
        workload = request("r", grammar)
        assert Request.from_wire(json.loads(json.dumps(workload.to_wire()))) == workload
    last = RequestOutput(request_id="r", tokens=[1], finish="stop", complete=True)
    assert RequestOutput.from_wire(last.to_wire()) == last


def test_mask_keeps_allowed_tokens() -> None:
    logits = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(2, VOCAB, generator=torch.Generator().manual_seed(1)) < 0.5
    actual = sampler.mask_rows(logits, torch.tensor([3, 1]), mask)
    for row in (0, 2, 4):
        assert torch.equal(actual[row], logits[row])
    for row, row_mask in ((3, mask[0]), (1, mask[1])):
        assert torch.equal(actual[row][row_mask], logits[row][row_mask])
        assert bool((actual[row][~row_mask] == -torch.inf).all())


def test_draft_masks_equal_those_of_accepted_draft() -> None:
    grammars = Grammars(TOK.byte_table(), VOCAB)
    draft = list(b"ab-0")
    state = grammars.start({"regex": "[ab]{1,3}-[0-9]{2}|ab"}, [END])
    assert state.count_valid([*draft, ord("x")]) == 4
    whole = grammars.next_token_mask([(state, draft)])
    for i, token in enumerate(draft):
        assert np.array_equal(whole[i], grammars.next_token_mask([(state, ())])[0])
        assert whole[i][END] == (i == 2)
        assert state.feed([token])


def test_draft_token_may_complete_a_grammar() -> None:
    engine = make_engine(make_model("modern"), None, TOK.byte_table(), prompt_lookup_max=2)
    params = {"grammar": {"regex": "(ab){3}"}, "temperature": 1.0, "logprobs": 0}
    assert answer(engine, ask("a", [1], max_tokens=9, seed=3, **params)) == list(b"ababab")
    assert engine.stats().num_accepted_tokens > 0


def test_grammars_and_failures_are_cached() -> None:
    grammars = Grammars(TOK.byte_table(), VOCAB)
    good, bad = {"choice": ["yes", "no"]}, {"regex": "(("}
    assert grammars.compile(good) is grammars.compile(dict(good))
    grammars.check(good)
    refusal = grammars.compile(bad)
    for _ in range(2):
        with pytest.raises(ValueError, match="this regex does not compile"):
            grammars.check(bad)
    assert grammars.compile(bad) is refusal
    for i in range(MAX_CACHED):
        grammars.check({"choice": [f"word {i}"]})
    assert grammars.compile(bad) is refusal  # somebody holds it
    for i in range(MAX_CACHED):
        grammars.check({"choice": [f"word {i}"]})
    reference = weakref.ref(refusal)
    del refusal
    assert reference() is None


def test_gbnf_equals_lark() -> None:
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    gbnf = {"lark": 'root ::= item+\nitem ::= "a" [0-9]'}
    state = grammars.start(gbnf, ())
    assert state.feed(b"a1a2")
    assert state.matcher.is_accepting()
    assert not state.feed(b"b")
    long = "root ::= " + " | ".join(['"a"'] * 2000)
    for wrong in ("root ::=", 'rule ::= "a"', "root ::= " + "(" * 5000, long, "\ud800"):
        with pytest.raises(ValueError, match=r"^grammar: this lark") as error:
            grammars.check({"lark": wrong})
        assert len(str(error.value)) < 500


def test_the_latest_grammars_stay_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_module, "MAX_CACHED", 2)
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    compile_text, texts = grammars._compile, list[str]()

    def compile_and_note(text: str) -> Any:
        texts.append(json.loads(text)["regex"])
        return compile_text(text)

    monkeypatch.setattr(grammars, "_compile", compile_and_note)
    for regex in "abacb":  # c takes the place of b, since a was used later
        grammars.compile({"regex": regex}).result()
        gc.collect()
    assert texts == ["a", "b", "c", "b"]


def test_a_grammar_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """As JSON: of {"regex": "aaaa"} 17 characters."""
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    monkeypatch.setattr(grammar_module, "MAX_CHARACTERS", 17)
    grammars.check({"regex": "aaaa"})
    with pytest.raises(ValueError, match="it has 18 characters as JSON, 17 are allowed"):
        grammars.check({"regex": "aaaaa"})


def test_few_large_grammars_may_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones, up to 17 characters here, never wait for them."""
    monkeypatch.setattr(grammar_module, "SMALL_CHARACTERS", 17)
    monkeypatch.setattr(grammar_module, "MAX_PENDING", 2)
    grammars = Grammars(TOK.byte_table(), TOK.vocab_size)
    gate = threading.Event()
    hold_up = grammars._large.submit(gate.wait, 60)
    try:
        large = [grammars.compile({"regex": letter * 5}) for letter in "ab"]
        with pytest.raises(EngineFull, match="grammars=2 are waiting"):
            grammars.compile({"regex": "ccccc"})
        grammars.check({"regex": "cccc"})
    finally:
        gate.set()
    assert hold_up.result()
    assert not any(isinstance(one.result(), str) for one in large)
    wait_for(lambda: not grammars._pending)
    grammars.check({"regex": "ccccc"})
