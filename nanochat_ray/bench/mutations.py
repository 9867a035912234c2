"""Broken requests by the thousand, the same for the same seed: what a server must survive."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

TOOL = {
    "type": "function",
    "function": {
        "name": "calculator",
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "calculator", "arguments": '{"expression": "1+1"}'},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
SAMPLING = {
    "max_tokens": 5,
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "n": 2,
    "stop": ["x", "yz"],
    "stop_token_ids": [7],
    "min_tokens": 1,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "logit_bias": {"65": 5},
    "ignore_eos": True,
    "stream": False,
}
USER = {"role": "user", "content": "hello"}
COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
SEEDS: list[tuple[str, dict[str, Any]]] = [
    (COMPLETIONS, {**SAMPLING, "prompt": "hello", "echo": True}),
    (COMPLETIONS, {**SAMPLING, "prompt": "hello", "logprobs": 2}),
    (COMPLETIONS, {**SAMPLING, "prompt": [65, 66, 67], "best_of": 2}),
    (COMPLETIONS, {**SAMPLING, "prompt": ["a", "b"], "stream": True}),
    (COMPLETIONS, {**SAMPLING, "prompt": [[65], [66]], "stream": True, "logprobs": 0}),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 4, "structured_outputs": {"choice": ["a", "b"]}}),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 4, "structured_outputs": {"regex": "[a-c]{2}"}}),
    (COMPLETIONS, {"prompt": "a", "max_tokens": 0, "echo": True, "prompt_logprobs": 1}),
    (
        CHAT,
        {
            **SAMPLING,
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            ],
            "logprobs": True,
            "top_logprobs": 2,
        },
    ),
    (
        CHAT,
        {
            **SAMPLING,
            "messages": [
                {"role": "user", "content": "1+1?"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
            ],
            "tools": [TOOL],
            "tool_choice": "auto",
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    (CHAT, {"messages": [USER], "max_tokens": 9, "tools": [TOOL], "tool_choice": "required"}),
    (
        CHAT,
        {
            "messages": [USER],
            "max_completion_tokens": 5,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "s", "schema": SCHEMA},
            },
        },
    ),
    (CHAT, {"messages": [USER], "max_tokens": 5, "response_format": {"type": "json_object"}}),
    (RESPONSES, {"input": "hello", "max_output_tokens": 5, "temperature": 0.5}),
    (
        RESPONSES,
        {
            "input": [{"role": "user", "content": [{"type": "input_text", "text": "hi"}]}],
            "instructions": "Be brief.",
            "max_output_tokens": 5,
            "text": {"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}},
            "metadata": {"a": "b"},
            "stream": True,
        },
    ),
    ("/tokenize", {"prompt": "hello"}),
    ("/tokenize", {"messages": [USER]}),
    ("/detokenize", {"tokens": [65, 66]}),
]
DEEP: Any = 0
for _ in range(60):
    DEEP = [DEEP]
ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63) - 1, 2**200, 0.5, -0.5, 1e308, 1e-320),
    *(1e-38, 1e-35, 100, float("nan"), float("inf"), "", "x", "\x00", "\ud800", "é🙂", "1"),
    *("a" * 3000, "[" * 500, "\u202e\ufeff\u0301", "<|bos|>", "<|assistant_end|>", "(a|a)*" * 20),
    *([], {}, [None], [""], [0], [-1], [[]], {"": 0}, {"type": "text"}, {"type": None}, DEEP),
    *([65] * 600, ["x"] * 200, {"65": 1e9}, {"-1": 1}, {"99999": 1}, "auto", "required", "none"),
    *({"type": "object"}, {"type": "array", "items": {}}, {"$ref": "#"}, {"enum": list(range(99))}),
]
FIELDS = [
    *("suffix", "echo", "functions", "priority", "", "🙂", "guided_json", "cache_salt", "logprobs"),
    *("continue_final_message", "add_generation_prompt", "tool_choice", "response_format", "n"),
]


def huge(rng: random.Random, size: int) -> Any:
    """About ``size`` bytes of JSON."""
    kinds = rng.randrange(8)
    if kinds == 0:
        return [rng.choice([-1, 65])] * (size // 4)
    if kinds == 1:
        return ["x"] * (size // 5)
    if kinds == 2:
        return [[65]] * (size // 6)
    if kinds == 3:
        return [{}] * (size // 4)
    if kinds == 4:
        return {str(i): 1 for i in range(size // 12)}
    if kinds == 5:
        return rng.choice(" a\n!1é[{") * (size // 2)
    if kinds == 6:
        return [USER] * (size // 40)
    return {
        "type": "object",
        "properties": {f"p{i}": {"type": "string"} for i in range(size // 32)},
    }


@dataclass(frozen=True)
class Mutation:
    """One request, ready to be sent."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]
    leaves_after_s: float | None
    """When the client closes the connection without waiting for the end."""


def mutations(count: int, seed: int, *, huge_bytes: int = 0) -> Iterator[Mutation]:
    """``huge_bytes``: about one in 50 has a value of so many bytes; 0 for none."""
    rng = random.Random(seed)
    for _ in range(count):
        path, body = rng.choice(SEEDS)
        size = huge_bytes if huge_bytes and rng.random() < 0.02 else 0
        kind = rng.choice(["application/json"] * 40 + ["text/plain", "", "application/x-json"])
        headers = {"content-type": kind} if kind else {}
        if rng.random() < 0.05:
            name = rng.choice(["content-encoding", "x-request-id", "authorization", "expect-ct"])
            headers[name] = rng.choice(["gzip", "", "x" * 2000, "Bearer x y", "a;b=c"])
        yield Mutation(
            method=rng.choice(["POST"] * 80 + ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"]),
            path=path,
            body=_mutate(rng, body, size),
            headers=headers,
            leaves_after_s=rng.uniform(0, 0.05) if rng.random() < 0.1 else None,
        )


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to each value inside of a JSON value."""
    paths = [path] if path else []
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            paths += _paths(inner, (*path, key))
    return paths


def _mutate(rng: random.Random, body: dict[str, Any], size: int) -> bytes:
    body = copy.deepcopy(body)
    for step in range(rng.choice((0, 1, 1, 1, 2, 3)) + bool(size)):
        paths = _paths(body)
        if not paths:
            break
        *path, key = rng.choice(paths)
        holder: Any = body
        for each in path:
            holder = holder[each]
        kind = rng.random()
        if size and step == 0:
            holder[key] = huge(rng, size)
            return json.dumps(body).encode()
        if kind < 0.15:
            del holder[key]
        elif kind < 0.25 and isinstance(holder, list):
            holder += [copy.deepcopy(holder[key])] * rng.randint(1, 9)
        elif kind < 0.35 and isinstance(holder, dict):
            holder[rng.choice(FIELDS)] = copy.deepcopy(rng.choice([holder[key], rng.choice(ODD)]))
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    return _damage(rng, json.dumps(body).encode())


def _damage(rng: random.Random, raw: bytes) -> bytes:
    if rng.random() >= 0.1:
        return raw
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        kind = rng.random()
        if kind < 0.4:
            data[at] = rng.randrange(256)
        elif kind < 0.7:
            del data[at:]
            data += b"{"
        else:
            data[at:at] = rng.choice([b"\xff\xfe", b"[" * 2000, b"1e999", b"\x00", b"NaN"])
    return bytes(data)
