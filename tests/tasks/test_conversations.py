"""A user's own conversations: what real files hold is read, and what is wrong is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from nanochat_ray.tasks import conversations
from nanochat_ray.tasks.conversations import Entry, load, parse_entry
from nanochat_ray.text.chat import render_conversation
from nanochat_ray.text.tokenizer import Tokenizer

TOK = Tokenizer.bytes_only()
OTHER = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}
USER, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"n": 1}'}}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def test_each_split_has_its_conversations(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    rows = [[USER, {**YES, "content": str(i)}] for i in range(40)]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    (own,) = load([Entry(str(path))], 0)
    assert [len(own.split(name)) for name in ("train", "val")] == [38, 2]


def read_one(path: Path, record: Any) -> list[dict[str, Any]]:
    """The conversation of a record, wherever the split has put it."""
    path.write_text("\n".join(json.dumps(r) for r in (record, OTHER)) + "\n")
    (own,) = load([Entry(str(path))], 0)
    both = [*own.train, *own.val]
    assert len(both) == 2
    (other,) = (m for m in both if m[0]["content"] == "x")
    both.remove(other)
    return both[0]


def learnt(messages: list[dict[str, Any]]) -> str:
    ids, mask = render_conversation(TOK, messages)
    return TOK.decode([i for i, m in zip(ids, mask, strict=True) if m])


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"messages": [USER, YES]}, "Yes<|assistant_end|>"),
        ([USER, YES], "Yes<|assistant_end|>"),
        ({"messages": [{"role": "system", "content": "Be"}, USER, YES]}, "Yes<|assistant_end|>"),
        ({"messages": [{"role": "developer", "content": "Be"}, USER, USER, YES]}, "Yes<|assist"),
        (
            {"messages": [USER, {**YES, "weight": 0}, USER, {**YES, "content": "No", "weight": 1}]},
            "No<|assistant_end|>",
        ),
        ({"messages": [USER, YES, USER, YES], "weights": [0, 1, 0, 0]}, "Yes<|assistant_end|>"),
        ([USER, {**YES, "weight": 0}, {**YES, "content": "No"}], "\n\nNo<|assistant_end|>"),
        (
            [USER, {**YES, "content": "No"}, {**YES, "weight": 0}, USER, YES],
            "NoYes<|assistant_end|>",
        ),
        (
            [USER, {**YES, "weight": 0}, {**YES, "weight": 0}, USER, {**YES, "content": "No"}],
            "No<|assistant_end|>",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}], "tools": TOOLS},
            '<|python_start|>{"name":"f","arguments":{"n":1}}<|python_end|>',
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "content": None, "tool_calls": [CALL]},
                    {"role": "tool", "tool_call_id": "a", "content": "42"},
                    YES,
                ]
            },
            '<|python_start|>{"name":"f","arguments":{"n":1}}<|python_end|>Yes<|assistant_end|>',
        ),
        (
            {
                "messages": [
                    USER,
                    {"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}},
                    {"role": "function", "name": "f", "content": "42"},
                    YES,
                ],
                "functions": [{"name": "f"}],
            },
            '<|python_start|>{"name":"f","arguments":{}}<|python_end|>Yes',
        ),
        ({"messages": [USER, {**YES, "content": [{"type": "text", "text": "Yes"}]}]}, "Yes<|as"),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be"},
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Yes"},
                ]
            },
            "Yes<|assistant_end|>",
        ),
        (
            {
                "system": "Be",
                "tools": json.dumps([{"name": "f"}]),
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"n": 1}}'},
                    {"from": "observation", "value": "42"},
                    {"from": "gpt", "value": "Yes"},
                ],
            },
            '<|python_start|>{"name":"f","arguments":{"n":1}}<|python_end|>Yes<|assistant_end|>',
        ),
        ({"instruction": "Hi", "input": "", "output": "Yes"}, "Yes<|assistant_end|>"),
        ({"instruction": "Hi", "context": None, "response": "Yes"}, "Yes<|assistant_end|>"),
        ({"prompt": "Hi", "completion": "Yes"}, "Yes<|assistant_end|>"),
        ({"prompt": [USER], "completion": [YES]}, "Yes<|assistant_end|>"),
        ({"prompt": "No", "completion": "No", "messages": [USER, YES]}, "Yes<|assistant_end|>"),
    ],
)
def test_formats_are_read(tmp_path: Path, record: Any, text: str) -> None:
    assert learnt(read_one(tmp_path / "my.jsonl", record)).startswith(text)


def test_an_instruction_is_followed_by_its_input(tmp_path: Path) -> None:
    record = {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "Be"}
    assert read_one(tmp_path / "my.jsonl", record) == read_one(
        tmp_path / "my.jsonl",
        [
            {"role": "system", "content": "Be"},
            {"role": "user", "content": "Add.\n\n1, 2"},
            {"role": "assistant", "content": "3"},
        ],
    )


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("nothing", r"line 2: not JSON"),
        ("[" * 100_000, r"line 2: not JSON: nested too deep"),
        ("3", r"line 2: 3 is no conversation"),
        ('{"prompt": "a"}', r"line 2: .*'messages' \(OpenAI\).*\['prompt'\]"),
        ({"instruction": "a", "input": 3, "output": "b"}, r"line 2: input=3 is not allowed: a t"),
        ({"prompt": [USER], "completion": "b"}, r"line 2: prompt=\[.*\] is not allowed: a text"),
        ('{"messages": []}', r"line 2: messages=\[\] is not allowed"),
        ('{"messages": [3]}', r"line 2: messages\[0\]=3 is not allowed"),
        ([USER, {"role": "robot", "content": "a"}], r"line 2: messages\[1\]\.role='robot'"),
        ([USER, {"role": ["assistant"], "content": "a"}], r"line 2: messages\[1\]\.role"),
        ([USER, {"role": "assistant", "content": 3}], r"line 2: messages\[1\]\.content=3"),
        (
            {"system": "Be", "conversations": [{"from": "tool", "value": "3"}]},
            r"line 2: conversations\[0\]\.tool_call_id=None is not allowed",
        ),
        ([USER, {**YES, "weight": 0.5}], r"line 2: messages\[1\]\.weight=0\.5 is not allowed"),
        ([{**USER, "weight": 1}, YES], r"line 2: messages\[0\]\.weight=1 is not allowed"),
        ([USER, {**YES, "weight": 0}], r"line 2: no message of the assistant's has a loss"),
        ([USER], r"line 2: no message of the assistant's has a loss"),
        ({"messages": [USER, YES], "weights": [1]}, r"line 2: weights=\[1\].*2 numbers"),
        (
            [USER, {"role": "assistant", "tool_calls": [3]}],
            r"line 2: messages\[1\]\.tool_calls\[0\]=3",
        ),
        ([USER, {"role": "tool", "content": "3"}, YES], r"line 2: messages\[1\]\.tool_call_id"),
        ({"messages": [USER, YES], "tools": [3]}, r"line 2: tools\[0\]=3 is not allowed"),
        ({"messages": [USER, YES], "tools": 3, "functions": [3]}, r"line 2: tools=3 is not all"),
        ([{**USER, "content": [{"type": []}]}, YES], r"line 2: messages\[0\]\.content\[0\]: type"),
        (
            [
                {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
                {"role": "tool", "tool_call_id": {"a": 1}, "content": "3"},
            ],
            r"line 2: messages\[1\]\.tool_call_id=\{'a': 1\} is not allowed",
        ),
        ({"conversations": [{"from": "martian", "value": "a"}]}, r"conversations\[0\]\.from="),
        ({"conversations": [{"from": "gpt", "value": 3}]}, r"conversations\[0\]\.value=3"),
    ],
)
def test_errors_name_line_and_message(tmp_path: Path, line: Any, error: str) -> None:
    path = tmp_path / "my.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_text(f"{json.dumps(OTHER)}\n{text}\n")
    with pytest.raises(ValueError, match=error) as caught:
        load([Entry(str(path))], 0)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def conversations_file(count: int) -> bytes:
    records = ([{**USER, "content": f"Hi {i}"}, YES] for i in range(count))
    return "".join(json.dumps(r) + "\n" for r in records).encode()


def test_validation_shares_no_conversation(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(conversations_file(100) + conversations_file(40))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(conversations_file(60)))
    (tmp_path / "README.md").write_text("no conversation")
    one, two = load([Entry(str(tmp_path / "a.jsonl")), Entry(str(tmp_path))], 0)
    for own in (one, two):
        assert 5 <= len(own.val) <= 10
        questions = {m[0]["content"] for m in own.train}
        assert len(questions) + len(own.val) == 100
        assert not questions & {m[0]["content"] for m in (*one.val, *two.val)}
    assert load([Entry(str(tmp_path))], 0) == load([Entry(str(tmp_path))], 0)


def test_counts_sample_and_repeat(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(conversations_file(100))
    for text, count in (("", 95), (":20", 20), (":200", 200), (":2x", 190), (":0.5x", 48)):
        (own,) = load([parse_entry(f"{path}{text}")], 1)
        assert len(own.train) == count
        times = [own.train.count(m) for m in own.train]
        assert max(times) - min(times) <= 1
        assert len(own.val) == 5
    assert conversations.digest(load([Entry(str(path), 20)], 0)) != conversations.digest(
        load([Entry(str(path), 20)], 1)
    )


def test_entries_are_parsed() -> None:
    s3 = "s3://b/a.jsonl?scheme=http&endpoint_override=127.0.0.1:8333"
    assert parse_entry(s3) == Entry(s3)
    assert parse_entry(f"{s3}:50") == Entry(s3, 50)
    assert parse_entry("s3://b/a.jsonl") == Entry("s3://b/a.jsonl")
    for bad in ("a:0", "a:0x", "a:1.5", ""):
        with pytest.raises(ValueError, match=r"chats='.*' is not allowed: write PATH"):
            parse_entry(bad)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "one.jsonl").write_text(json.dumps(OTHER))
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfa{}")
    (tmp_path / "bad.jsonl.gz").write_bytes(b"no gzip")
    for name, error in (
        ("a.txt", r"chats='.*a\.txt' is not allowed: it names no file in \.jsonl"),
        ("none.jsonl", r"chats='.*none\.jsonl' does not exist"),
        ("one.jsonl", r"one\.jsonl' has too few conversations: 2 different"),
        ("bad.jsonl", r"chats file .*bad\.jsonl is not UTF-8"),
        ("bad.jsonl.gz", r"chats file .*bad\.jsonl\.gz cannot be read"),
    ):
        with pytest.raises(ValueError, match=error):
            load([Entry(str(tmp_path / name))], 0)
