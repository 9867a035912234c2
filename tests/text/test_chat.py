"""The chat template: any order of messages becomes turns that alternate."""

from __future__ import annotations

from typing import Any

import pytest

from nanochat_ray.text.chat import from_openai, render_prompt
from nanochat_ray.text.tokenizer import Tokenizer

TOK = Tokenizer.bytes_only()
NAMES = {i: name for name, i in TOK.specials.items()}
SHORT = {
    "<|bos|>": "",
    "<|user_start|>": "<U>",
    "<|user_end|>": "</U>",
    "<|assistant_start|>": "<A>",
    "<|assistant_end|>": "</A>",
    "<|python_start|>": "<P>",
    "<|python_end|>": "</P>",
    "<|output_start|>": "<O>",
    "<|output_end|>": "</O>",
}


def render(messages: list[dict[str, Any]], tools: Any = (), **fields: Any) -> str:
    ids = render_prompt(TOK, from_openai(messages, tools), **fields)
    return "".join(SHORT[NAMES[i]] if i in NAMES else TOK.decode([i]) for i in ids)


def m(role: str, content: Any = None, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def calls_of(*calls: tuple[str, str, str], content: Any = None) -> dict[str, Any]:
    tool_calls = [{"id": i, "function": {"name": n, "arguments": a}} for i, n, a in calls]
    return m("assistant", content, tool_calls=tool_calls)


def result(call: str, content: Any) -> dict[str, Any]:
    return m("tool", content, tool_call_id=call)


CITY = ("c", "weather", '{"city": "Bonn"}')


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([m("user", "a"), m("user", "b")], "<U>a\n\nb</U><A>"),
        ([m("system", "s"), m("system", "t"), m("user", "a")], "<U>s\n\nt\n\na</U><A>"),
        ([m("system", "s"), m("user", "a", name="Ann")], "<U>s\n\na</U><A>"),
        ([m("system", "s")], "<U>s</U><A>"),
        ([m("developer", "s"), m("assistant", "hi"), m("user", "a")],
         "<U>s</U><A>hi</A><U>a</U><A>"),
        ([m("assistant", "hi"), m("user", "a")], "<A>hi</A><U>a</U><A>"),
        ([m("user", "a"), m("assistant", "b")], "<U>a</U><A>b</A><A>"),
        ([m("user", "a"), m("assistant", "b"), m("assistant", "c"), m("user", "d")],
         "<U>a</U><A>b\n\nc</A><U>d</U><A>"),
        ([m("user", "a"), m("assistant", "b"), m("system", "s"), m("user", "c")],
         "<U>a</U><A>b</A><U>s\n\nc</U><A>"),
        ([m("user", "a"), m("system", "s")], "<U>a\n\ns</U><A>"),
        ([m("user")], "<U></U><A>"),
        ([m("user", "")], "<U></U><A>"),
        ([m("user", [])], "<U></U><A>"),
        ([m("system", ""), m("user", "a")], "<U>a</U><A>"),
        ([m("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])],
         "<U>a\nb</U><A>"),
        ([m("user", "a"), calls_of(CITY), result("c", "wet")],
         '<U>a</U><A><P>{"name":"weather","arguments":{"city":"Bonn"}}</P><O>wet</O>'),
        ([m("user", "a"), calls_of(CITY, content="So:"), result("c", None), m("assistant", "Wet."),
          m("user", "b")],
         '<U>a</U><A>So:<P>{"name":"weather","arguments":{"city":"Bonn"}}</P><O></O>Wet.</A>'
         "<U>b</U><A>"),
        ([m("user", "a"), calls_of(CITY, ("d", "f", "")), result("d", "2"), result("c", "1")],
         '<U>a</U><A><P>{"name":"f","arguments":{}}</P><O>2</O>'
         '<P>{"name":"weather","arguments":{"city":"Bonn"}}</P><O>1</O>'),
        ([m("user", "a"), calls_of(("c", "calculator", '{"expression":"1+1"}')), result("c", "2")],
         "<U>a</U><A><P>1+1</P><O>2</O>"),
    ],
)  # fmt: skip
def test_any_order_becomes_turns(messages: list[dict[str, Any]], text: str) -> None:
    assert render(messages) == text


def test_the_final_message_is_continued() -> None:
    prefill = [m("user", "a"), m("assistant", "So b")]
    assert render(prefill, continue_final_message=True) == "<U>a</U><A>So b"
    assert render(prefill, add_generation_prompt=False) == "<U>a</U><A>So b</A>"
    assert render([m("user", "a")], add_generation_prompt=False) == "<U>a</U>"
    with pytest.raises(ValueError, match=r"messages\[0\].role='user' .* continue_final_message"):
        render([m("user", "a")], continue_final_message=True)


def test_functions_are_told_to_the_model() -> None:
    weather = {"name": "weather", "description": "d", "parameters": {"type": "object"}}
    tools = [{"type": "function", "function": weather}]
    tools += [{"type": "function", "function": {"name": "calculator"}}]
    declaration = 'Functions:\n{"name":"weather","description":"d","parameters":{"type":"object"}}'
    assert render([m("system", "s"), m("user", "a")], tools) == f"<U>s\n\n{declaration}\n\na</U><A>"
    assert render([m("user", "a")], tools[1:]) == "<U>a</U><A>"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([m("user", "a"), m("king", "b")], r"messages\[1\]\.role='king'"),
        ([m("user", "a"), result("x", "1")], r"messages\[1\]\.tool_call_id='x'"),
        ([m("user", "a"), calls_of(CITY), m("user", "b")], r"messages\[2\]\.role='user'"),
        ([m("user", "a"), calls_of(CITY)], "the result of the call 'c' is missing"),
        ([m("user", "a"), calls_of(CITY, CITY)], r"messages\[1\]\.tool_calls\[1\]\.id='c'"),
        ([calls_of(("c", "f", "[1]"))], r"messages\[0\]\.tool_calls\[0\]\.function\.arguments"),
        ([m("user", [{"type": "image_url"}])], r"messages\[0\]\.content\[0\]: type 'image_url'"),
    ],
)
def test_wrong_messages_are_named(messages: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        render(messages)
