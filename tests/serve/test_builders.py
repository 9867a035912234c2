"""Responses and chunks of hand-made deltas: usage, ranking, and log-probabilities in each form."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from nanochat_ray.engine.detokenizer import ToolResultEvent
from nanochat_ray.engine.request import TokenLogprob
from nanochat_ray.serve.generation import Delta
from nanochat_ray.serve.openai import logprobs
from nanochat_ray.serve.openai.builder import ChoiceState, ResponseBuilder
from nanochat_ray.serve.openai.chat import ChatBuilder
from nanochat_ray.serve.openai.completions import CompletionBuilder
from nanochat_ray.text.tokenizer import Tokenizer
from nanochat_ray.text.tool_calls import CallDelta
from tests.serve.test_parse import chat, completion, serving

TOK = Tokenizer.bytes_only()
EURO = TOK.encode("€")


def with_logprob(token: int, logprob: float, *top: tuple[int, float]) -> tuple[int, TokenLogprob]:
    return token, TokenLogprob(logprob=logprob, top=list(top))


def builder(deltas: list[Delta], **fields: Any) -> CompletionBuilder:
    """Of a completion with these fields, after ``deltas``."""
    result = CompletionBuilder(serving(), completion(**fields), "cmpl-1")
    for delta in deltas:
        result.add(delta)
    return result


def chat_builder(deltas: list[Delta], **fields: Any) -> ChatBuilder:
    result = ChatBuilder(serving(), chat(**fields), "chatcmpl-1")
    for delta in deltas:
        result.add(delta)
    return result


@pytest.mark.parametrize("choices", [{"n": 2}, {"n": 1, "best_of": 2}])
def test_usage_counts_a_prompt_once(choices: dict[str, int]) -> None:
    """Two prompts of 2 and 3 tokens with two choices each, of which the first has the cache's."""
    deltas = [Delta(i, num_tokens=10 + i, cached_tokens=[1, 7, 2, 8][i]) for i in range(4)]
    deltas.append(Delta(0, num_tokens=5))
    response = builder(deltas, prompt=["a", "bc"], **choices).response()
    assert response["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 10 + 11 + 12 + 13 + 5,
        "total_tokens": 5 + 51,
        "prompt_tokens_details": {"cached_tokens": 1 + 2},
    }


def test_best_of_ranks_by_the_mean() -> None:
    """Of three choices of each prompt; sums would rank the short ones first."""
    scores = [[-2.0], [-1.0, -1.0, -1.0], [-1.5, -1.4], [], [-3.0], [-0.5, -4.0]]
    deltas = [
        Delta(i, text=f"choice {i}", logprobs=[with_logprob(65, score) for score in row])
        for i, row in enumerate(scores)
    ]
    response = builder(deltas, prompt=["a", "b"], n=2, best_of=3, return_token_ids=True).response()
    prompts = [choice["prompt_token_ids"] for choice in response["choices"]]
    assert prompts == [[TOK.bos, ord(letter)] for letter in "aabb"]
    texts = [choice["text"] for choice in response["choices"]]
    assert texts == ["choice 1", "choice 2", "choice 5", "choice 4"]
    assert [choice["index"] for choice in response["choices"]] == [0, 1, 2, 3]
    assert ChoiceState("").mean_logprob() == -math.inf
    in_order = builder(deltas, prompt=["a", "b"], n=3).response()
    assert [choice["text"] for choice in in_order["choices"]] == [f"choice {i}" for i in range(6)]


def test_each_choice_has_the_ids_of_its_prompt() -> None:
    deltas = [Delta(i, token_ids=[65 + i], finish_reason="length") for i in range(4)]
    result = builder(deltas, prompt=["a", "bc"], n=2, return_token_ids=True)
    choices = result.response()["choices"]
    assert [choice["token_ids"] for choice in choices] == [[65], [66], [67], [68]]
    prompts = [completion(prompt=text).requests[0].prompt for text in ("a", "bc")]
    assert [choice["prompt_token_ids"] for choice in choices] == [
        *([prompts[0]] * 2),
        *([prompts[1]] * 2),
    ]
    chunks = [json.loads(result.chunks(delta)[6:])["choices"][0] for delta in deltas]
    assert [chunk["prompt_token_ids"] for chunk in chunks] == [
        choice["prompt_token_ids"] for choice in choices
    ]
    best_of_two = builder(
        [Delta(0, token_ids=[1], logprobs=[with_logprob(1, -2.0)]),
         Delta(1, token_ids=[2], logprobs=[with_logprob(2, -1.0)])],
        best_of=2, return_token_ids=True,
    )  # fmt: skip
    assert [choice["token_ids"] for choice in best_of_two.response()["choices"]] == [[2]]


def test_the_weights_are_named() -> None:
    for result in (builder([]), chat_builder([])):
        assert result.headers == {}
        assert result.response()["system_fingerprint"] is None
        result.name_weights([Delta(0), Delta(0, weight_version="step-1")])
        assert result.headers == {"x-checkpoint": "step-1"}
        assert result.response()["system_fingerprint"] == "step-1"
        assert json.loads(result.chunks(Delta(0, "a"))[6:])["system_fingerprint"] == "step-1"


@pytest.mark.parametrize("make", [builder, chat_builder])
def test_the_end_of_a_stream_has_its_usage(make: Any) -> None:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    result: ResponseBuilder = make([Delta(0, "a", num_tokens=3)], **options)
    assert json.loads(result.chunks(Delta(0, "a"))[6:])["usage"] is None
    last, end, _ = result.closing().split("\n\n")
    assert json.loads(last[6:])["usage"] == result.usage()
    assert json.loads(last[6:])["choices"] == []
    assert end == "data: [DONE]"
    plain: ResponseBuilder = make([], stream=True)
    assert "usage" not in json.loads(plain.chunks(Delta(0, "a"))[6:])
    assert plain.closing() == "data: [DONE]\n\n"


@pytest.mark.parametrize("make", [builder, chat_builder])
def test_every_chunk_may_have_the_usage_so_far(make: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    result: ResponseBuilder = make([], stream=True, stream_options=options, return_token_ids=True)
    prompt = result.generation.prompt_tokens
    for opening in result.opening().split("\n\n")[:-1]:
        assert json.loads(opening[6:])["usage"]["total_tokens"] == prompt
    for total in (2, 5):
        delta = Delta(0, "a", num_tokens=3 if total == 5 else 2)
        result.add(delta)
        usage = json.loads(result.chunks(delta)[6:])["usage"]
        counts = (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"])
        assert counts == (prompt, total, prompt + total)
    assert json.loads(result.closing().split("\n\n")[0][6:])["usage"] == usage
    options["include_usage"] = False
    plain: ResponseBuilder = make([], stream=True, stream_options=options)
    assert "usage" not in json.loads(plain.chunks(Delta(0, "a"))[6:])


@pytest.mark.parametrize(
    ("texts", "calls", "content"),
    [(["a", "b"], [], "ab"), ([""], [], ""), ([""], ["f"], None), (["a"], ["f"], "a")],
)
def test_content_of_a_message(texts: list[str], calls: list[str], content: str | None) -> None:
    deltas = [Delta(0, text) for text in texts]
    deltas += [Delta(0, tool_calls=[CallDelta('{"a"', name), CallDelta(":1}")]) for name in calls]
    deltas += [Delta(0, tool_results=[ToolResultEvent("1+1", "2")], finish_reason="stop")]
    (choice,) = chat_builder(deltas).response()["choices"]
    message: Any = choice["message"]
    assert (message["content"], message["refusal"], message["role"]) == (content, None, "assistant")
    assert message["calculator"] == [{"expression": "1+1", "result": "2"}]
    functions = [call["function"] for call in message.get("tool_calls", [])]
    assert functions == [{"name": "f", "arguments": '{"a":1}'}] * len(calls)
    assert choice["finish_reason"] == "stop"


def test_a_chat_has_logprobs_if_they_are_requested() -> None:
    tokens = [with_logprob(65, -0.5, (65, -0.5))]
    delta = Delta(0, "A", logprobs=tokens, num_tokens=1)
    for fields, want in (({"logprobs": True}, logprobs.for_chat(TOK, tokens)), ({}, None)):
        result = chat_builder([delta], **fields)
        assert result.response()["choices"][0]["logprobs"] == want
        assert json.loads(result.chunks(delta)[6:])["choices"][0]["logprobs"] == want


def test_chunks_of_a_chat_by_hand() -> None:
    result = chat_builder([], stream=True, n=2, return_token_ids=True)
    first, second, _ = result.opening().split("\n\n")
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": result.timestamp}
    head |= {"model": "tiny", "system_fingerprint": None}
    delta = {"role": "assistant", "content": ""}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
    ids = {"prompt_token_ids": result.generation.requests[0].prompt}
    assert json.loads(first[6:]) == {**head, "choices": [choice], **ids}
    assert json.loads(second[6:]) == {**head, "choices": [{**choice, "index": 1}]}
    last = Delta(1, "", token_ids=[7], finish_reason="length")
    choice = {"index": 1, "delta": {}, "logprobs": None, "finish_reason": "length"}
    want = {**head, "choices": [{**choice, "token_ids": [7]}]}
    assert json.loads(result.chunks(last)[6:]) == want


def test_a_chat_has_its_token_ids_if_they_are_requested() -> None:
    deltas = [Delta(0, token_ids=[7]), Delta(0, token_ids=[8])]
    response = chat_builder(deltas, return_token_ids=True).response()
    assert response["prompt_token_ids"] == chat().requests[0].prompt
    assert response["choices"][0]["token_ids"] == [7, 8]
    assert "prompt_token_ids" not in chat_builder(deltas).response()


def test_parts_of_a_streamed_call() -> None:
    """The first names the function and the call; the others continue its arguments."""
    deltas = [Delta(0, tool_calls=[CallDelta("{", "f")]), Delta(0, tool_calls=[CallDelta("}")])]
    result, calls = chat_builder([]), []
    for delta in deltas:
        result.add(delta)
        (choice,) = json.loads(result.chunks(delta)[6:])["choices"]
        calls += choice["delta"]["tool_calls"]
    call: Any = result.choices[0].call
    first = {"name": "f", "arguments": "{"}
    assert calls == [
        {"index": 0, "id": call["id"], "type": "function", "function": first},
        {"index": 0, "function": {"arguments": "}"}},
    ]


# --- log-probabilities --------------------------------------------------------------------------


def test_chat_logprobs_by_hand() -> None:
    """A token with a part of a character is named by its bytes, as at OpenAI."""
    tokens = [with_logprob(65, -0.5, (65, -0.5), (EURO[0], -2.0)), with_logprob(EURO[1], -1.0)]
    assert logprobs.for_chat(TOK, tokens) == {
        "content": [
            {
                "token": "A", "logprob": -0.5, "bytes": [65],
                "top_logprobs": [
                    {"token": "A", "logprob": -0.5, "bytes": [65]},
                    {"token": "bytes:\\xe2", "logprob": -2.0, "bytes": [0xE2]},
                ],
            },
            {"token": "bytes:\\x82", "logprob": -1.0, "bytes": [0x82], "top_logprobs": []},
        ],
        "refusal": None,
    }  # fmt: skip


def test_completion_logprobs_by_hand() -> None:
    """The token itself is among the likeliest; a character begins with its first byte."""
    tokens: list[Any] = [
        (67, None), with_logprob(65, -3.0, (66, -0.1)), *(with_logprob(t, -1.0) for t in EURO),
        with_logprob(10, -0.2, (10, -0.2), (65, -2.0)),
    ]  # fmt: skip
    result = logprobs.for_completion(TOK, tokens, logprobs.TextOffsets(TOK))
    assert result["token_logprobs"] == [None, -3.0, -1.0, -1.0, -1.0, -0.2]
    euro = ["bytes:\\xe2", "bytes:\\x82", "bytes:\\xac"]
    assert result["tokens"] == ["C", "A", *euro, "\n"]
    assert result["top_logprobs"] == [
        None, {"B": -0.1, "A": -3.0}, *({name: -1.0} for name in euro), {"\n": -0.2, "A": -2.0},
    ]  # fmt: skip
    assert result["text_offset"] == [0, 1, 2, 2, 2, 3]


def test_text_that_is_no_utf8_has_offsets_and_names() -> None:
    """A character that is never complete counts as U+FFFD once the next one has begun."""
    tokenizer = Tokenizer([bytes([b]) for b in range(256)] + [b"\x82\n"])
    tokens: list[Any] = [with_logprob(t, -1.0) for t in (EURO[0], 65, 256, 66)]
    result = logprobs.for_completion(tokenizer, tokens, logprobs.TextOffsets(tokenizer))
    assert result["tokens"] == ["bytes:\\xe2", "A", "bytes:\\x82\\x0a", "B"]
    assert result["text_offset"] == [0, 0, 2, 4]


def test_prompt_logprobs_by_hand() -> None:
    """Ranks count from 1; a token beyond the ``count`` likeliest ones has its rank if known."""
    top = ((66, -0.1), (67, -2.0), (65, -3.0))
    tokens: list[Any] = [
        (TOK.bos, None),
        with_logprob(65, -3.0, *top),
        with_logprob(68, -9.0, *top),
    ]
    first, second, third = logprobs.for_prompt(TOK, tokens, 2)
    assert first is None
    b = {"logprob": -0.1, "rank": 1, "decoded_token": "B"}
    c = {"logprob": -2.0, "rank": 2, "decoded_token": "C"}
    assert second == {"66": b, "67": c, "65": {"logprob": -3.0, "rank": 3, "decoded_token": "A"}}
    assert third == {"66": b, "67": c, "68": {"logprob": -9.0, "rank": None, "decoded_token": "D"}}


def test_an_echo_has_the_scores_of_its_prompt() -> None:
    scores = [None, *(TokenLogprob(logprob=-float(i), top=[]) for i in (1, 2))]
    deltas = [
        Delta(
            i, "x", logprobs=[with_logprob(120, -5.0)], prompt_logprobs=list(scores), num_tokens=1
        )
        for i in range(2)
    ]
    fields = {"prompt": [[65, 66, 67], [68, 69, 70]], "logprobs": 0, "echo": True}
    result = builder(deltas, **fields)
    first, second = (choice["logprobs"] or {} for choice in result.response()["choices"])
    assert first["tokens"] == ["A", "B", "C", "x"]
    assert second["tokens"] == ["D", "E", "F", "x"]
    assert second["token_logprobs"] == [None, -1.0, -2.0, -5.0]
    assert second["text_offset"] == [0, 1, 2, 3]
    assert result.opening() == ""  # it comes in the first chunk
    chunk = json.loads(result.chunks(deltas[1])[6:])["choices"][0]
    assert (chunk["index"], chunk["text"], chunk["logprobs"]) == (1, "DEFx", second)
    plain = builder([], prompt="ab", echo=True)
    assert json.loads(plain.opening()[6:])["choices"][0]["text"] == "ab"
    assert builder([], prompt="ab").opening() == ""
