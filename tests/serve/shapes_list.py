"""76 requests, sent to two servers of one model, and how the answers differ.

    python -m tests.serve.shapes_list OUR_URL THEIR_URL

Status, keys and types are compared, of whole answers and of streams' chunks; of greedy answers and
of token ids also what they say.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx

USER = [{"role": "user", "content": "hello"}]
TURNS = [*USER, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "again"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
JSON_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "s", "schema": {"type": "object", "properties": {}}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a <|bos|> place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"a": "é"}'}}
RESULTS = [
    *USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "dry<|output_end|>"},
]
# Conversations, of which the token ids and a greedy answer are compared.
CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"messages": PARTS},
    {"messages": [{"role": "developer", "content": "Be brief."}, *USER], "tools": [TOOL]},
    {"messages": RESULTS, "tools": [TOOL]},
    {"messages": [{"role": "user", "content": "<|user_end|> é 😀"}]},
    {"messages": TURNS[:2], "add_generation_prompt": False, "continue_final_message": True},
]
GREEDY = {"temperature": 0}
EXACT = ("text", "content", "tokens", "prompt_tokens", "completion_tokens")
"""Keys whose values are compared, where they are texts, numbers or lists of these."""
# What is added to a plain request of each kind.
COMMON: list[dict[str, Any]] = [
    {},
    {"stream": True},
    {"stream": True, "stream_options": {"include_usage": True}},
    {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
    {"n": 2, "temperature": 1, "seed": 1},
    {"n": 2, "stream": True, "seed": 1},
    {"stop": "e"},
    {"stop": ["e", "a"], "max_tokens": 8},
    {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.05},
    {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    {"logit_bias": {"65": 5}},
    {"ignore_eos": True, "min_tokens": 2},
    {"user": "me", "metadata": {"a": "b"}, "store": False},
    {"temperature": -1},
    {"temperature": "hot"},
    {"top_p": 2},
    {"max_tokens": -1},
    {"n": 0},
    {"max_tokens": 100_000},
    {"model": "nobody"},
    {"stop": [1]},
    {"logit_bias": {"x": 1}},
    {"stream_options": {"include_usage": True}},
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": ["a", "b"]},
    {"prompt": [65, 66]},
    {"prompt": [65, 66], **GREEDY},
    {"prompt": "The sea é", **GREEDY},
    {"prompt": [[65], [66]], "stream": True},
    {"echo": True},
    {"logprobs": 0},
    {"logprobs": 2},
    {"logprobs": 2, "stream": True},
    {"logprobs": 2, "echo": True},
    {"prompt": []},
    {"prompt": 5},
]
CHATS: list[dict[str, Any]] = [
    {"messages": TURNS},
    {"messages": PARTS},
    {"messages": [{"role": "system", "content": "Be brief."}, *USER]},
    {"logprobs": True},
    {"logprobs": True, "top_logprobs": 2},
    {"logprobs": True, "top_logprobs": 2, "stream": True},
    {"top_logprobs": 2},
    {"response_format": {"type": "text"}},
    {"response_format": JSON_SCHEMA},
    *({**fields, **GREEDY} for fields in CONVERSATIONS),
    {"messages": "hello"},
    {"messages": [{"role": "king", "content": "x"}]},
]
OTHERS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/models", None),
    ("GET", "/health", None),
    ("GET", "/version", None),
    ("POST", "/tokenize", {"prompt": "hello"}),
    *(("POST", "/tokenize", fields) for fields in CONVERSATIONS),
    ("POST", "/tokenize", {"prompt": "hello", "return_token_strs": True}),
    ("POST", "/detokenize", {"tokens": [65, 66]}),
    ("GET", "/v1/completions", None),
    ("POST", "/v1/nothing", {}),
]


def requests(model: str) -> list[tuple[str, str, Any]]:
    plain = {"model": model, "max_tokens": 4}
    completions, chats = COMMON + COMPLETIONS, COMMON[:6] + CHATS
    return [
        *(("POST", "/v1/completions", {**plain, "prompt": "hello", **f}) for f in completions),
        *(("POST", "/v1/chat/completions", {**plain, "messages": USER, **f}) for f in chats),
        *OTHERS,
        ("POST", "/v1/chat/completions", {"model": model}),
        ("POST", "/v1/completions", "no object"),
        ("POST", "/v1/completions", None),
        ("GET", "/v1/models/nobody", None),
    ]


def shape(value: Any, exact: bool = False) -> Any:
    """With ``exact`` the values of ``EXACT``'s keys are part of it."""
    if isinstance(value, dict):
        return {
            key: json.dumps(one)
            if exact and key in EXACT and "{" not in repr(one)
            else shape(one, exact)
            for key, one in value.items()
        }
    if isinstance(value, list):
        return [shape(value[0], exact)] if value else []
    if isinstance(value, bool) or value is None:
        return str(value and True)
    return "number" if isinstance(value, (int, float)) else "text"


def answer(
    client: httpx.Client, base: str, method: str, path: str, body: Any
) -> tuple[int, dict[str, Any]]:
    """Status, and the shape: of the body, or of the first, a middle and the last chunk."""
    response = client.request(method, base + path, json=body, timeout=60)
    kind = response.headers.get("content-type", "")
    exact = path == "/tokenize" or (isinstance(body, dict) and body.get("temperature") == 0)
    if kind.startswith("text/event-stream"):
        lines = [x[6:] for x in response.text.split("\n\n") if x.startswith("data: ")]
        chunks = [shape(json.loads(x)) for x in lines if x != "[DONE]"]
        rows = {"first": chunks[0], "middle": chunks[len(chunks) // 2], "last": chunks[-1]}
        return response.status_code, {**rows, "done": lines[-1]}
    try:
        return response.status_code, shape(response.json(), exact)
    except ValueError:
        return response.status_code, {"text": kind.split(";")[0]}


def differences(ours: Any, theirs: Any, at: str = "") -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        rows = []
        for key in [*ours, *(k for k in theirs if k not in ours)]:
            name = f"{at}.{key}" if at else key
            if key not in theirs:
                rows.append(f"only ours: {name}")
            elif key not in ours:
                rows.append(f"only theirs: {name}")
            else:
                rows += differences(ours[key], theirs[key], name)
        return rows
    if isinstance(ours, list) and isinstance(theirs, list) and ours and theirs:
        return differences(ours[0], theirs[0], f"{at}[]")
    return [] if ours == theirs else [f"{at}: {ours} here, {theirs} there"]


def compare(client: httpx.Client, ours: str, theirs: str) -> list[tuple[str, list[str]]]:
    """For each request, in words, how the answers differ."""
    names = [client.get(f"{u}/v1/models").json()["data"][0]["id"] for u in (ours, theirs)]
    rows = []
    for one, other in zip(*map(requests, names), strict=True):
        (status, here), (their_status, there) = (
            answer(client, ours, *one),
            answer(client, theirs, *other),
        )
        differ = [] if status == their_status else [f"status {status} here, {their_status} there"]
        if status == their_status:
            differ += differences(here, there)
        body = one[2] if isinstance(one[2], dict) else {"body": one[2]}
        summary = {k: v for k, v in body.items() if k not in ("model", "prompt", "messages")}
        rows.append((f"{one[0]} {one[1]} {json.dumps(summary)}", differ))
    return rows


if __name__ == "__main__":
    with httpx.Client() as client:
        for name, differ in compare(client, *sys.argv[1:3]):
            print(name, *(f"\n    {one}" for one in differ), sep="")
