"""The list of requests that is compared with vLLM: each gets an answer of a known status."""

from __future__ import annotations

import httpx
import pytest

from nanochat_ray.serve.app import build_app
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import serving
from tests.serve.shapes_list import answer, compare, differences, requests

TOK = Tokenizer.bytes_only()


@pytest.mark.slow
def test_every_request_of_the_list_is_answered() -> None:
    engine = ScriptedClient(TOK.encode("hello you"))
    app = build_app(engine, TOK, "tiny", 256)
    with serving(app) as url, httpx.Client(verify=False) as client:
        cases = requests("tiny")
        assert len(cases) >= 60
        statuses = [answer(client, url, *one)[0] for one in cases]
        assert set(statuses) <= {200, 400, 404, 405, 415}
        assert statuses.count(200) > 35
        assert all(not rows for _, rows in compare(client, url, url))


def test_differences_are_named() -> None:
    ours = {"a": "number", "b": [{"c": "text"}]}
    assert differences(ours, {"a": "text", "b": [{"d": "text"}]}) == [
        "a: number here, text there",
        "only ours: b[].c",
        "only theirs: b[].d",
    ]
