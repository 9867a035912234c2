"""Every field of a body as what the engine gets."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from nanochat_ray.serve.generation import GenerationRequest, Limits
from nanochat_ray.serve.metrics import PrometheusSink, RequestMetrics
from nanochat_ray.serve.openai import chat as chat_module
from nanochat_ray.serve.openai.chat import parse_chat
from nanochat_ray.serve.openai.completions import parse_completion
from nanochat_ray.serve.openai.errors import ApiError
from nanochat_ray.serve.openai.schema.requests import ChatRequest, CompletionRequest
from nanochat_ray.serve.responses.request import parse_responses
from nanochat_ray.serve.responses.schema import ResponsesRequest
from nanochat_ray.serve.serving import Serving
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient

TOK = Tokenizer.bytes_only()
BOS, USER_END, ANSWER = TOK.bos, TOK.special("<|user_end|>"), TOK.special("<|assistant_start|>")
PROMPT = [BOS, TOK.special("<|user_start|>"), ord("h"), ord("i"), USER_END, ANSWER]
CHAT = {"messages": [{"role": "user", "content": "hi"}]}
MODEL_LEN = 64
DEFAULTS: dict[str, Any] = {
    "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
    "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": {}, "min_tokens": 0,
    "stop": (), "stop_ids": (), "eos_ids": (BOS, TOK.special("<|assistant_end|>")),
    "ignore_eos": False, "grammar": None, "logprobs": None, "logprobs_mode": "raw_logprobs",
    "prompt_logprobs": None, "prompt_logprobs_start": 1,
}  # fmt: skip
SAMPLING: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"temperature": 0}, {"temperature": 0}),
    ({"temperature": 0.3}, {"temperature": 0.3}),
    ({"top_p": 0.9}, {"top_p": 0.9}),
    ({"top_k": 5}, {"top_k": 5}),
    ({"top_k": -1}, {"top_k": 0}),
    ({"min_p": 0.2}, {"min_p": 0.2}),
    ({"presence_penalty": 0.4}, {"presence_penalty": 0.4}),
    ({"frequency_penalty": -0.6}, {"frequency_penalty": -0.6}),
    ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
    ({"logit_bias": {"7": 2, "8": -100}}, {"logit_bias": {7: 2.0, 8: -100.0}}),
    ({"stop_token_ids": [3, 4]}, {"stop_ids": (3, 4)}),
    ({"ignore_eos": True}, {"ignore_eos": True}),
    ({"min_tokens": 3, "max_tokens": 9}, {"min_tokens": 3, "max_tokens": 9}),
    ({"min_tokens": 9, "max_tokens": 3}, {"min_tokens": 3, "max_tokens": 3}),
    ({"guided_regex": "a+"}, {"grammar": {"regex": "a+"}}),
]


def serving(**limits: Any) -> Serving:
    metrics = RequestMetrics(PrometheusSink("tiny"))
    return Serving(ScriptedClient([]), TOK, "tiny", MODEL_LEN, Limits(**limits), metrics)


def chat(client: str = "", limits: dict[str, Any] | None = None, **fields: Any) -> Any:
    body = ChatRequest.model_validate({**CHAT, **fields})
    return asyncio.run(parse_chat(serving(**limits or {}), body, client))


def completion(client: str = "", limits: dict[str, Any] | None = None, **fields: Any) -> Any:
    body = CompletionRequest.model_validate({"prompt": "hi", **fields})
    return asyncio.run(parse_completion(serving(**limits or {}), body, client))


def responses(**fields: Any) -> Any:
    body = ResponsesRequest.model_validate({"input": "hi", **fields})
    return asyncio.run(parse_responses(serving(), body, ""))


def params(generation: GenerationRequest) -> dict[str, Any]:
    """Of its only request; the seed is tested alone."""
    (request,) = generation.requests
    values = dataclasses.asdict(request.params)
    assert 0 <= values.pop("seed") < 2**63
    return values


@pytest.mark.parametrize(("fields", "changes"), SAMPLING)
def test_sampling_fields_reach_the_engine(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    rest = {"max_tokens": MODEL_LEN - len(PROMPT)}
    assert params(chat(**fields)) == {**DEFAULTS, **rest, **changes}
    assert params(completion(**fields)) == {**DEFAULTS, "max_tokens": 16, **changes}


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({"max_tokens": 9}, {"max_tokens": 9}),
        ({"max_tokens": 9, "max_completion_tokens": 7}, {"max_tokens": 7}),
        ({"max_tokens": -1}, {}),
        ({"max_tokens": 10**6}, {}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": True, "top_logprobs": 4}, {"logprobs": 4}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
    ],
)
def test_chat_fields_reach_the_engine(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    generation = chat(**fields)
    assert params(generation) == {**DEFAULTS, "max_tokens": 58, **changes}
    assert generation.logprobs is bool(fields.get("logprobs"))


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({"max_tokens": -1}, {"max_tokens": MODEL_LEN - 3}),
        ({"logprobs": 2}, {"logprobs": 2}),
        ({"logprobs": 2, "echo": True}, {"logprobs": 2, "prompt_logprobs": 2}),
        ({"prompt_logprobs": 3}, {"prompt_logprobs": 3}),
        ({"prompt_logprobs": 1, "logprobs": 2, "echo": True},
         {"logprobs": 2, "prompt_logprobs": 2}),
        ({"echo": True, "max_tokens": 0}, {"max_tokens": 0, "prompt_logprobs": 0}),
        ({"logprobs": 0}, {"logprobs": 0}),
    ],
)  # fmt: skip
def test_completion_fields_reach_the_engine(
    fields: dict[str, Any], changes: dict[str, Any]
) -> None:
    generation = completion(**fields)
    assert params(generation) == {**DEFAULTS, "max_tokens": 16, **changes}
    assert generation.logprobs is ("logprobs" in fields)
    assert generation.prompt_logprobs == fields.get("prompt_logprobs")
    assert generation.prefixes == ["hi" if "echo" in fields else ""]


@pytest.mark.parametrize(
    ("fields", "changes"),
    [
        ({}, {}),
        ({"temperature": 0.2, "top_p": 0.5}, {"temperature": 0.2, "top_p": 0.5}),
        ({"max_output_tokens": 5}, {"max_tokens": 5}),
        ({"top_logprobs": 3}, {"logprobs": 3}),
        ({"include": ["message.output_text.logprobs"]}, {"logprobs": 0}),
        ({"text": {"format": {"type": "json_object"}}}, {"grammar": {"json_object": True}}),
    ],
)
def test_responses_fields_reach_the_engine(fields: dict[str, Any], changes: dict[str, Any]) -> None:
    generation = responses(**fields)
    assert params(generation) == {**DEFAULTS, "max_tokens": 58, **changes}
    assert generation.requests[0].prompt == PROMPT
    assert responses(seed=5).requests[0].params.seed == 5
    assert (
        responses(cache_salt="s").requests[0].cache_scope
        == chat(cache_salt="s").requests[0].cache_scope
    )


def test_tools_are_in_the_prompt_unless_they_are_off() -> None:
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    prompts = {
        choice: chat(tools=tools, tool_choice=choice).requests[0].prompt
        for choice in ("none", "auto", "required")
    }
    assert prompts["none"] == PROMPT
    assert "look_up" in TOK.decode(prompts["auto"])
    assert prompts["required"] == [*prompts["auto"], TOK.special("<|python_start|>")]


LONG = "x " * 20_000
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": f'{{"a": "{LONG}"}}'}}


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": LONG}]},
        {"tools": [{"type": "function", "function": {"name": "f", "description": LONG}}]},
        {
            "messages": [
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "1", "content": "2"},
            ]
        },
        {"messages": [{"role": "assistant", "content": [{"type": "refusal", "refusal": LONG}]}]},
    ],
)
def test_long_chats_are_tokenized_in_a_thread(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def render(*_: Any) -> list[int]:
        threads.append(threading.current_thread())
        return PROMPT

    monkeypatch.setattr(chat_module, "_render", render)
    chat(**fields)
    assert threads[0] is not threading.current_thread()
    chat()
    assert threads[1] is threading.current_thread()


@pytest.mark.parametrize("parse", [chat, completion])
def test_seeds_count_up_over_choices(parse: Callable[..., GenerationRequest]) -> None:
    for seed, seeds in ((0, [0, 1, 2]), (5, [5, 6, 7]), (-1, [2**63 - 1, 0, 1])):
        generation = parse(seed=seed, n=3)
        assert [request.params.seed for request in generation.requests] == seeds
    one, other = (parse(n=2).requests for _ in range(2))
    assert one[0].params.seed != other[0].params.seed
    assert one[1].params.seed == (one[0].params.seed or 0) + 1


@pytest.mark.parametrize("parse", [chat, completion])
def test_what_a_request_is_beside_sampling(parse: Callable[..., GenerationRequest]) -> None:
    (plain,) = parse().requests
    assert (plain.priority, plain.client, plain.cache_scope, plain.deadline) == (0, "", "", None)
    assert (plain.output_token_ids, plain.weight_version) == ((), "")
    assert plain.prompt == (PROMPT if parse is chat else [BOS, ord("h"), ord("i")])
    before = time.monotonic()
    (own,) = parse("key 1", {"request_timeout_s": 100.0}, priority=4).requests
    assert (own.priority, own.client) == (4, "key 1")
    assert own.deadline is not None
    assert before + 100 <= own.deadline <= time.monotonic() + 100
    scopes = [
        parse(client, cache_salt=salt).requests[0].cache_scope
        for client in ("", "a", "b")
        for salt in (None, "x", "y")
    ]
    assert len(set(scopes)) == 9
    assert parse("a", cache_salt="bc").requests[0].cache_scope != (
        parse("ab", cache_salt="c").requests[0].cache_scope
    )


@pytest.mark.parametrize("parse", [chat, completion])
def test_what_an_answer_is_beside_requests(parse: Callable[..., GenerationRequest]) -> None:
    plain = parse()
    assert (plain.stop, plain.stream, plain.include_usage) == ([], False, False)
    assert (plain.n, plain.candidates, plain.return_token_ids) == (1, 1, False)
    assert plain.prompt_tokens == len(plain.requests[0].prompt)
    other = parse(stop="a", stream=True, stream_options={"include_usage": True}, n=2)
    assert (other.stop, other.stream, other.include_usage) == (["a"], True, True)
    assert (other.n, other.candidates, len(other.requests)) == (2, 2, 2)
    assert len({request.id for request in other.requests}) == 2
    assert other.prompt_tokens == plain.prompt_tokens  # however many choices share it
    assert parse(stop=["a", "b"], return_token_ids=True).stop == ["a", "b"]
    assert parse(stream=True, stream_options={}).include_usage is False


def test_prompts_of_a_completion() -> None:
    many = completion(prompt=["a", "bc"], n=2, best_of=3, echo=True)
    assert [request.prompt for request in many.requests] == [[BOS, 97]] * 3 + [[BOS, 98, 99]] * 3
    assert many.prefixes == ["a"] * 3 + ["bc"] * 3
    assert (many.n, many.candidates, many.prompt_tokens, many.num_hidden) == (2, 3, 5, 1)
    assert {request.params.logprobs for request in many.requests} == {0}  # to rank them
    ids = completion(prompt=[[65, 66], [67]], echo=True)
    assert [request.prompt for request in ids.requests] == [[65, 66], [67]]
    assert (ids.prefixes, ids.prompt_tokens, ids.num_hidden) == (["AB", "C"], 3, 0)


def test_an_echo_of_a_chat_is_its_last_message() -> None:
    messages = [*CHAT["messages"], {"role": "assistant", "content": "well"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat(messages=messages, echo=True, **options).prefixes == ["well"]
    assert chat(messages=messages, **options).prefixes == [""]
    assert chat(echo=True).prefixes == [""]


@pytest.mark.parametrize(
    ("parse", "fields", "param", "code"),
    [
        (chat, {"model": "other"}, "model", "model_not_found"),
        (completion, {"model": "other"}, "model", "model_not_found"),
        (completion, {"prompt": [TOK.vocab_size]}, "prompt", None),
        (completion, {"prompt": [65] * 64}, "prompt", "context_length_exceeded"),
        (completion, {"prompt": [65] * 65, "max_tokens": 0, "echo": True}, "prompt",
         "context_length_exceeded"),
        (completion, {"prompt": "x", "n": 129}, "n", None),
        (completion, {"prompt": ["x"] * 43, "n": 3}, "n", None),
        (completion, {"prompt": ["x"] * 43, "best_of": 3}, "best_of", None),
        (completion, {"prompt": ["x"] * 129}, "prompt", None),
        (chat, {"messages": [{"role": "user", "content": ""}] * 64}, "messages",
         "context_length_exceeded"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_serve(
    parse: Callable[..., GenerationRequest],
    fields: dict[str, Any],
    param: str,
    code: str | None,
) -> None:
    with pytest.raises(ApiError) as refusal:
        parse(**fields)
    assert (refusal.value.param, refusal.value.code) == (param, code)
    assert refusal.value.status == (404 if param == "model" else 400)


def test_the_largest_that_the_model_serves() -> None:
    assert completion(prompt=[TOK.vocab_size - 1], model="tiny").requests[0].params.max_tokens == 16
    assert completion(prompt=[65] * 63).requests[0].params.max_tokens == 1
    full = completion(prompt=[65] * 64, max_tokens=0, echo=True)
    assert full.requests[0].params.max_tokens == 0
    assert len(completion(prompt=["x"] * 64, n=2).requests) == 128
    assert Limits().max_body_bytes == 2 * 1024 * 1024
    assert Limits().body_timeout_s == 60


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"prompt": "x", "n": 9}, "n=9 is not allowed: at most 8 choices", "n"),
        ({"prompt": "x", "n": 2, "best_of": 9}, "best_of=9 is not allowed: at most 8", "best_of"),
        ({"prompt": ["x"] * 3, "n": 3}, "n=3 is not allowed for each of 3 prompts: at most", "n"),
        ({"prompt": ["x"] * 9}, "n=1 is not allowed for each of 9 prompts: at most 8", "prompt"),
    ],
)
def test_too_many_choices_are_refused(fields: dict[str, Any], message: str, param: str) -> None:
    limits = {"max_choices": 8}
    with pytest.raises(ApiError, match=message) as refusal:
        completion(limits=limits, **fields)
    assert (refusal.value.status, refusal.value.param) == (400, param)
    assert len(completion(limits=limits, prompt=["x"] * 4, n=2).requests) == 8
