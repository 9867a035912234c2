"""Scopes share no computed prefixes: neither counts nor timing tell what another has sent."""

from __future__ import annotations

import dataclasses

import pytest

from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE, hash_blocks
from nanochat_ray.engine.request import Request
from tests.engine.engine_kit import ask, finish, make_engine, make_model, tokens

PROMPT = [i * 7 % 300 for i in range(4 * BLOCK_SIZE + 5)]


def scoped_request(name: str, scope: str, prompt: list[int] = PROMPT) -> Request:
    return dataclasses.replace(ask(name, prompt, max_tokens=4), cache_scope=scope)


def cached_counts(engine: Engine, *requests: Request) -> tuple[list[int], list[list[int]]]:
    """Prompt tokens that each of the requests, run together, found computed; and their answers."""
    for request in requests:
        engine.add(request)
    outputs = finish(engine)
    counts = [sum(o.cached_tokens for o in outputs[r.id]) for r in requests]
    return counts, [tokens(outputs[r.id]) for r in requests]


@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_scopes_share_no_prefix(layout: str) -> None:
    engine = make_engine(make_model("modern"), kv_layout=layout, prefix_cache_tokens=512)
    (first,), (answer,) = cached_counts(engine, scoped_request("a", "alice"))
    assert first == 0
    for scope, want in (
        ("bob", 0),
        ("", 0),
        ("alice", 4 * BLOCK_SIZE),
        ("bob", 4 * BLOCK_SIZE),
    ):
        counts, answers = cached_counts(engine, scoped_request("b", scope))
        assert counts == [want], scope
        assert answers == [answer]  # what is cached changes no token
    engine.check_integrity()


def steps_to_first_token(engine: Engine, *requests: Request) -> list[int]:
    for request in requests:
        engine.add(request)
    first: dict[str, int] = {}
    step = 0
    while engine.has_work:
        step += 1
        for output in engine.step():
            if output.tokens:
                first.setdefault(output.request_id, step)
    return [first[request.id] for request in requests]


@pytest.mark.parametrize("layout", ["slots", "paged"])
def test_no_wait_for_another_scopes_prefix(layout: str) -> None:
    other = [299 - token for token in PROMPT]
    fields = {"kv_layout": layout, "prefix_cache_tokens": 512, "max_num_batched_tokens": 256}
    same, different = (
        steps_to_first_token(
            make_engine(make_model("modern"), **fields),
            scoped_request("a", "alice"),
            scoped_request("b", "bob", prompt),
        )
        for prompt in (PROMPT, other)
    )
    assert same == different


def test_scope_changes_all_block_hashes() -> None:
    scopes = ["", "a", "b", "\ud800"]
    names = [name for scope in scopes for name in hash_blocks(PROMPT, len(PROMPT), scope)]
    assert len(set(names)) == len(names) == 4 * len(scopes)


def test_scope_survives_the_wire() -> None:
    request = scoped_request("a", "alice")
    assert Request.from_wire(request.to_wire()).cache_scope == "alice"
    assert request.with_seed().cache_scope == "alice"
    with pytest.raises(ValueError, match="cache_scope=1 is not allowed"):
        Request(id="r", prompt=[1], cache_scope=1)  # type: ignore[arg-type]
