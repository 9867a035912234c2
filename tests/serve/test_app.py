"""The protocol over a scripted engine: shapes, streams, errors, clients that leave."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.client import UnavailableError
from nanochat_ray.serve.generation import Limits
from nanochat_ray.serve.keys import hash_key
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient, full
from tests.serve.serving import get, post, serving
from tests.waiting import wait_for

TOK = Tokenizer.bytes_only()
USER = [{"role": "user", "content": "hello"}]
JSON = {"content-type": "application/json"}


def ids(text: str) -> list[int]:
    """Ids of ``text``, in which ``[`` … ``=`` … ``]`` is a use of the calculator."""
    marks = {"[": ["<|python_start|>"], "=": ["<|python_end|>", "<|output_start|>"]}
    marks["]"] = ["<|output_end|>"]
    values: list[int] = []
    for char in text:
        values += [TOK.special(m) for m in marks[char]] if char in marks else TOK.encode(char)
    return values


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient(ids("Grüße, 12+7 is [12+7=19]19! 🙂"))


LIMITS = Limits(max_body_bytes=5000, max_choices=8)


@pytest.fixture
def url(engine: ScriptedClient) -> Iterator[str]:
    with serving(build_app(engine, TOK, "tiny", 256, limits=LIMITS)) as url:
        yield url


@pytest.fixture(scope="module")
def refusing_url() -> Iterator[str]:
    """Of a server for all refusals, none of which reaches its engine."""
    engine = ScriptedClient([65])
    with serving(build_app(engine, TOK, "tiny", 256, limits=LIMITS)) as url:
        yield url
    assert not engine.requests


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


TEXT = "Grüße, 12+7 is 19! 🙂"


ANSWER_IDS = ids("Grüße, 12+7 is [12+7=19]19! 🙂")
"""Special tokens and the calculator's output are part of them."""


def test_token_ids_in_and_out(client: openai.OpenAI, engine: ScriptedClient) -> None:
    wish = {"return_token_ids": True}
    whole = client.completions.create(model="tiny", prompt=[1, 2], max_tokens=99, extra_body=wish)
    (choice,) = whole.choices
    assert choice.prompt_token_ids == [1, 2]
    assert choice.token_ids[: len(ANSWER_IDS)] == ANSWER_IDS
    assert len(choice.token_ids) == whole.usage.completion_tokens
    chat = client.chat.completions.create(model="tiny", messages=USER, extra_body=wish)
    assert chat.choices[0].token_ids == choice.token_ids
    assert chat.prompt_token_ids == list(engine.requests[-1].prompt)
    plain = client.completions.create(model="tiny", prompt=[1, 2], max_tokens=99)
    assert not hasattr(plain.choices[0], "token_ids")


def test_token_ids_in_streams(client: openai.OpenAI, engine: ScriptedClient) -> None:
    options = {"stream": True, "extra_body": {"return_token_ids": True}}
    chunks = list(client.completions.create(model="tiny", prompt=[1, 2], echo=True, **options))
    prompts = [getattr(c.choices[0], "prompt_token_ids", None) for c in chunks]
    assert prompts == [[1, 2], *[None] * (len(chunks) - 1)]
    streamed_ids = [token for c in chunks for token in c.choices[0].token_ids]
    assert streamed_ids == ANSWER_IDS[: len(streamed_ids)]
    assert len(streamed_ids) > 10
    chats = list(client.chat.completions.create(model="tiny", messages=USER, **options))
    assert chats[0].prompt_token_ids == list(engine.requests[-1].prompt)
    assert not any(hasattr(chunk, "prompt_token_ids") for chunk in chats[1:])
    ids_of_chunks = (getattr(chunk.choices[0], "token_ids", []) for chunk in chats)
    answer_ids = [token for token_ids in ids_of_chunks for token in token_ids]
    assert answer_ids[: len(ANSWER_IDS)] == ANSWER_IDS


def test_models(client: openai.OpenAI, url: str) -> None:
    (model,) = client.models.list().data
    assert get(f"{url}/v1/models/").json()["data"][0]["id"] == model.id
    assert model.id == "tiny"
    assert client.models.retrieve("tiny").model_dump()["max_model_len"] == 256
    with pytest.raises(openai.NotFoundError, match="gpt-5"):
        client.models.retrieve("gpt-5")


def test_chat(client: openai.OpenAI, engine: ScriptedClient) -> None:
    answer = client.chat.completions.create(model="tiny", messages=USER)
    choice = answer.choices[0]
    assert choice.message.content == TEXT
    assert choice.finish_reason == "stop"
    assert choice.message.calculator == [{"expression": "12+7", "result": "19"}]
    assert answer.usage.prompt_tokens == len(engine.requests[0].prompt) == 9
    assert answer.usage.completion_tokens == len(engine.tokens) + 1
    assert not engine.running


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == TEXT
    assert [c.choices[0].finish_reason for c in chunks[:-1] if c.choices[0].finish_reason] == [
        "stop"
    ]
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 20
    values = [c.choices[0].delta for c in chunks[:-1] if hasattr(c.choices[0].delta, "calculator")]
    assert values[0].calculator == [{"expression": "12+7", "result": "19"}]


def test_raw_events(url: str) -> None:
    body = {"messages": USER, "stream": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    texts = [
        choice["delta"].get("content", "")
        for line in lines[:-1]
        for choice in json.loads(line.removeprefix("data: "))["choices"]
    ]
    assert "".join(texts) == TEXT
    assert all("\ufffd" not in text for text in texts)  # half a character


def test_completions(client: openai.OpenAI, engine: ScriptedClient) -> None:
    engine.tokens = ids("abc")
    one = client.completions.create(model="tiny", prompt="x", echo=True, max_tokens=5)
    assert one.choices[0].text == "xabc"
    assert engine.requests[0].prompt[0] == TOK.bos
    many = client.completions.create(model="tiny", prompt=["x", "y"], n=2, seed=5)
    assert [c.index for c in many.choices] == [0, 1, 2, 3]
    assert [c.text for c in many.choices] == ["abc"] * 4
    assert [r.params.seed for r in engine.requests[1:]] == [5, 6, 5, 6]
    tokens = client.completions.create(model="tiny", prompt=[65, 66], max_tokens=2, echo=True)
    assert tokens.choices[0].text == "ABab"
    assert tokens.choices[0].finish_reason == "length"
    chunks = list(client.completions.create(model="tiny", prompt="x", n=2, stream=True, echo=True))
    texts = ["".join(c.choices[0].text for c in chunks if c.choices[0].index == i) for i in (0, 1)]
    assert texts == ["xabc", "xabc"]


def test_what_asks_for_nothing_that_is_missing_is_taken(url: str) -> None:
    fields = {"suffix": "", "modalities": ["text"], "use_beam_search": False, "functions": None}
    for path, rest in (("completions", {"prompt": "x"}), ("chat/completions", chat())):
        assert post(f"{url}/v1/{path}", json={**rest, **fields}).status_code == 200


def test_stop_string_across_tokens_frees_the_slot(
    client: openai.OpenAI, engine: ScriptedClient
) -> None:
    engine.tokens, engine.finish = ids("one two END three"), None
    answer = client.completions.create(model="tiny", prompt="x", stop=["END"], max_tokens=99)
    assert answer.choices[0].text == "one two "
    assert answer.choices[0].finish_reason == "stop"
    assert len(engine.aborts) == 1


def test_sampling_fields_reach_the_engine(client: openai.OpenAI, engine: ScriptedClient) -> None:
    extra = {"top_k": 7, "min_p": 0.1, "ignore_eos": True, "min_tokens": 2, "user": "me"}
    client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ],
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=33,
        logit_bias={"65": -100},
        frequency_penalty=0.5,
        extra_body=extra,
    )
    params = engine.requests[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.9, 7, 0.1)
    assert (params.max_tokens, params.min_tokens, params.ignore_eos) == (33, 2, True)
    assert params.logit_bias == {65: -100.0}
    assert "Be brief.\n\nhi" in TOK.decode(engine.requests[0].prompt)


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": USER, **fields}


REFUSED: list[tuple[str, Any, int, str | None, str | None]] = [
    ("chat/completions", b"{", 400, None, "invalid_json"),
    ("chat/completions", b"[1]", 400, None, None),
    ("chat/completions", {}, 400, "messages", None),
    ("chat/completions", chat(model="gpt-5"), 404, "model", "model_not_found"),
    ("chat/completions", chat(messages=[]), 400, "messages", None),
    ("chat/completions", chat(messages="hi"), 400, "messages", None),
    ("chat/completions", chat(messages=[{"role": "king"}]), 400, "messages[0].role", None),
    ("chat/completions", chat(messages=[*USER, {"role": "x"}]), 400, "messages[1].role", None),
    ("chat/completions", chat(continue_final_message=True), 400, "messages[0].role", None),
    ("chat/completions", chat(messages=[{"role": "user", "content": 3}]), 400, None, None),
    (
        "chat/completions",
        chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]),
        400,
        "messages[0].content[0]",
        None,
    ),
    ("chat/completions", chat(temperature=3), 400, "temperature", None),
    ("chat/completions", chat(temperature="hot"), 400, "temperature", None),
    ("chat/completions", b'{"messages": [], "temperature": NaN}', 400, None, "invalid_json"),
    ("chat/completions", chat(top_p=0), 400, "top_p", None),
    ("chat/completions", chat(seed=2**70), 400, "seed", None),
    ("chat/completions", chat(n=9), 400, "n", None),
    ("chat/completions", chat(max_tokens=0), 400, "max_tokens", None),
    ("chat/completions", chat(max_tokens=0), 400, "max_tokens", None),
    ("chat/completions", chat(max_completion_tokens=-2), 400, "max_completion_tokens", None),
    ("completions", {"prompt": "x", "max_tokens": -2}, 400, "max_tokens", None),
    ("chat/completions", chat(stop=["a"] * 17), 400, "stop", None),
    ("chat/completions", chat(stream_options={}), 400, "stream_options", None),
    ("chat/completions", chat(tools=[{}]), 400, "tools[0].type", None),
    ("chat/completions", chat(response_format={"type": "x"}), 400, "response_format.type", None),
    (
        "chat/completions",
        chat(messages=[{"role": "user", "content": "long " * 60}]),
        400,
        "messages",
        "context_length_exceeded",
    ),
    ("chat/completions", b"x" * 5001, 413, None, None),
    ("completions", {"prompt": []}, 400, "prompt", None),
    ("completions", {"prompt": ["x"] * 9}, 400, "prompt", None),
    ("completions", {"prompt": ["x", "y"], "best_of": 5}, 400, "best_of", None),
    ("completions", {"prompt": [999]}, 400, "prompt", None),
    ("completions", {"prompt": [[1], []]}, 400, None, None),
    ("completions", {"prompt": "x", "max_tokens": 1.5}, 400, "max_tokens", None),
    ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens", None),
    ("completions", {"prompt": "x", "suffix": "y"}, 400, "suffix", None),
    ("completions", {"prompt": "x", "allowed_token_ids": [1]}, 400, "allowed_token_ids", None),
    ("completions", {"prompt": "x", "skip_special_tokens": False}, 400, None, None),
    ("chat/completions", chat(functions=[{"name": "f"}]), 400, "functions", None),
    ("chat/completions", chat(modalities=["audio"]), 400, "modalities", None),
    ("completions", {"prompt": "x" * 300}, 400, "prompt", "context_length_exceeded"),
    ("nothing", {}, 404, None, "not_found"),
]


@pytest.mark.parametrize(("path", "body", "status", "param", "code"), REFUSED)
def test_refusals(
    refusing_url: str, path: str, body: Any, status: int, param: str | None, code: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = post(f"{refusing_url}/v1/{path}", content=content, headers=JSON)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert param is None or error["param"] == param
    assert error["code"] == code


def test_full_queue_and_no_engine(url: str, engine: ScriptedClient) -> None:
    engine.refuse = UnavailableError("no engine is running")
    response = post(f"{url}/v1/chat/completions", json=chat())
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    assert response.json()["error"]["code"] == "engine_unavailable"
    assert get(f"{url}/health").status_code == 503
    engine.refuse = full()
    response = post(f"{url}/v1/chat/completions", json=chat(stream=True))
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    figures = get(f"{url}/metrics").text
    for status in (429, 503):
        labels = f'model_name="tiny",status="{status}"'
        assert f"nanochat_request_refusals_total{{{labels}}} 1.0" in figures
    # Nowhere else.
    assert 'nanochat_prompt_tokens_total{model_name="tiny"} 0.0' in figures
    successes = re.findall(r"nanochat_request_success_total\{.*\} (.+)", figures)
    assert set(successes) == {"0.0"}


def test_error_before_the_stream_began_has_its_status(
    client: openai.OpenAI, engine: ScriptedClient
) -> None:
    engine.break_after = 0
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(model="tiny", messages=USER, stream=True)
    assert caught.value.status_code == 503


def test_error_after_the_stream_began_is_an_event(
    client: openai.OpenAI, engine: ScriptedClient
) -> None:
    engine.break_after = 3
    with pytest.raises(openai.APIError, match="engine was lost"):
        list(client.chat.completions.create(model="tiny", messages=USER, stream=True))


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_slots(
    url: str, engine: ScriptedClient, stream: bool, n: int
) -> None:
    engine.delay, engine.tokens = 0.02, ids("x" * 10_000)
    body = json.dumps(chat(stream=stream, n=n, max_tokens=200)).encode()
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        wait_for(lambda: len(engine.running) == n)
        if stream:
            assert b"200 OK" in connection.recv(65536)
    wait_for(lambda: not engine.running)
    assert len(engine.aborts) == n


def test_keys(engine: ScriptedClient) -> None:
    app = build_app(engine, TOK, "tiny", 256, keys=["one", "two"])
    with serving(app) as url:
        good = {"Authorization": "Bearer two"}
        assert get(f"{url}/v1/models", headers=good).status_code == 200
        for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "Basic one"}):
            response = get(f"{url}/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        body = {"prompt": "x", "priority": 3}
        assert post(f"{url}/v1/completions", json=body, headers=good).status_code == 200
        assert engine.requests[0].priority == 3
        other = {"Authorization": "Bearer one"}
        assert post(f"{url}/v1/completions", json=body, headers=other).status_code == 200
        one, two = (request.client for request in engine.requests)
        assert one.startswith("key ")
        assert one != two
        assert get(f"{url}/health").status_code == 200
        assert get(url).status_code == 200


@pytest.mark.slow
def test_keys_and_salts_scope_the_cache(engine: ScriptedClient) -> None:
    def scopes(keys: list[str], pairs: list[tuple[str, str | None]]) -> list[str]:
        engine.requests.clear()
        with serving(build_app(engine, TOK, "tiny", 256, keys=keys)) as url:
            for key, salt in pairs:
                headers = {"Authorization": f"Bearer {key}"}
                body = {"max_tokens": 1, "cache_salt": salt}
                chat = {**body, "messages": USER}
                for path, payload in (
                    ("completions", {**body, "prompt": "x"}),
                    ("chat/completions", chat),
                ):
                    answer = post(f"{url}/v1/{path}", json=payload, headers=headers)
                    assert answer.status_code == 200, answer.text
        values = [request.cache_scope for request in engine.requests]
        assert values[::2] == values[1::2]  # of completions and of chats
        return values[::2]

    plain, same, with_salt, other = scopes([], [("x", None), ("y", None), ("x", "s"), ("x", "t")])
    assert plain == same == ""
    assert len({plain, with_salt, other}) == 3
    keys = [hash_key("one"), hash_key("two")]
    one, two, one_salted = scopes(keys, [("one", None), ("two", None), ("one", "s")])
    assert len({"", one, two, one_salted, with_salt}) == 5
    # Engines outlive a deployment in which a key has another place.
    assert scopes(keys[::-1], [("one", None), ("two", None)]) == [one, two]
    with serving(build_app(engine, TOK, "tiny", 256)) as url:
        answer = post(f"{url}/v1/completions", json={"prompt": "x", "cache_salt": ""})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "cache_salt"


def test_chunked_body_that_is_too_large(url: str) -> None:
    response = post(
        f"{url}/v1/completions",
        content=iter([b" " * 4000, b" " * 4000]),
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 413
    assert "5,000" in response.json()["error"]["message"]


def test_tokenize(url: str) -> None:
    values = post(f"{url}/tokenize", json={"prompt": "AB"}).json()
    assert values == {"count": 3, "max_model_len": 256, "tokens": [TOK.bos, 65, 66]}
    usage = post(f"{url}/v1/completions", json={"prompt": "AB"}).json()["usage"]
    assert usage["prompt_tokens"] == 3
    bare = post(f"{url}/tokenize", json={"prompt": "AB", "add_special_tokens": False}).json()
    assert bare["tokens"] == [65, 66]
    back = post(f"{url}/detokenize", json={"tokens": [65, 66]}).json()
    assert back == {"prompt": "AB"}
    assert post(f"{url}/tokenize", json={"messages": USER}).json()["count"] == 9


def test_page_carries_its_policy(url: str) -> None:
    response = get(url)
    assert "script-src 'sha256-" in response.headers["content-security-policy"]
    assert "http" not in response.text.split("<body>")[1]


@pytest.mark.parametrize(("value", "room"), [(10**6, True), (-1, True), (None, True), (5, False)])
def test_max_tokens_is_cut_to_what_fits(
    url: str, engine: ScriptedClient, value: int | None, room: bool
) -> None:
    assert post(f"{url}/v1/chat/completions", json=chat(max_tokens=value)).status_code == 200
    fields = {"messages": USER, "max_completion_tokens": value}
    assert post(f"{url}/v1/chat/completions", json=fields).status_code == 200
    prompts = {"prompt": ["a", "longer"], "max_tokens": 16 if value is None else value}
    assert post(f"{url}/v1/completions", json=prompts).status_code == 200
    for request in engine.requests[: 4 if value is not None else 2]:
        target = 256 - len(request.prompt) if room else 5
        assert request.params.max_tokens == target


def test_draft_tokens_behind_a_stop_are_not_counted(url: str, engine: ScriptedClient) -> None:
    engine.tokens, engine.per_step = ids("one two three"), 100
    body = {"prompt": "x", "stop": "two"}
    answer = post(f"{url}/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == "one "
    assert answer["usage"]["completion_tokens"] == len("one two")


def test_min_tokens_holds_against_stop_strings(url: str, engine: ScriptedClient) -> None:
    engine.tokens = ids("abababab")
    body = {"prompt": "x", "stop": ["ab"], "min_tokens": 5}
    answer = post(f"{url}/v1/completions", json=body).json()
    assert answer["choices"][0]["text"] == "abab"
    assert answer["usage"]["completion_tokens"] == 6


def test_streamed_text_offsets_are_those_of_the_whole(url: str, engine: ScriptedClient) -> None:
    engine.tokens = ids("a<b é <x>y")
    body = {"prompt": "x", "stop": "<x>z", "logprobs": 0, "max_tokens": 40}
    whole = post(f"{url}/v1/completions", json=body).json()["choices"][0]
    offsets: list[int] = []
    with httpx.stream("POST", f"{url}/v1/completions", json={**body, "stream": True}) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                scores = json.loads(line[6:])["choices"][0]["logprobs"]
                offsets += scores["text_offset"] if scores else []
    assert offsets == whole["logprobs"]["text_offset"]
    assert offsets[:5] == [0, 1, 2, 3, 4]


def test_lone_surrogates_are_answered(url: str) -> None:
    for body in (
        b'{"prompt": "a\\ud800b", "echo": true}',
        b'{"prompt": "a", "stop": "\\udc00"}',
        b'{"prompt": "a", "stop": "\\udc00", "stream": true}',
    ):
        assert post(f"{url}/v1/completions", content=body, headers=JSON).status_code == 200, body
    body = b'{"prompt": "\\ud800", "echo": true}'
    echo_answer = post(f"{url}/v1/completions", content=body, headers=JSON).json()
    assert echo_answer["choices"][0]["text"].startswith("\N{REPLACEMENT CHARACTER}")
    for body in (b'{"prompt": "a", "model": "\\ud800"}', b'{"prompt": "a", "stop": [["\\ud800"]]}'):
        answer = post(f"{url}/v1/completions", content=body, headers=JSON)
        assert answer.status_code in (400, 404)
        assert answer.json()["error"]["message"]


def test_echo_alone_may_fill_the_context(url: str) -> None:
    body = {"prompt": "x" * 255, "echo": True, "max_tokens": 0}
    assert post(f"{url}/v1/completions", json=body).status_code == 200
    assert post(f"{url}/v1/completions", json={**body, "max_tokens": 1}).status_code == 400


def test_zero_top_logprobs_need_no_logprobs(url: str) -> None:
    for extra in ({"logprobs": False, "top_logprobs": 0}, {"top_logprobs": 0}):
        assert post(f"{url}/v1/chat/completions", json=chat(**extra)).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("completions", {"prompt": "x", "guided_regex": "a+"}, "guided_regex"),
        ("chat/completions", chat(response_format={"type": "json_object"}), "response_format"),
        ("responses", {"input": "x", "text": {"format": {"type": "json_object"}}}, "text.format"),
    ],
)
def test_a_grammar_that_fails_later_is_a_400(
    url: str, engine: ScriptedClient, path: str, body: dict[str, Any], field: str
) -> None:
    engine.finish, engine.error = "error", "grammar: the lexer has too many states"
    engine.tokens = []
    answer = post(f"{url}/v1/{path}", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"] == f"{field}: the lexer has too many states"
    assert error["param"] == field
