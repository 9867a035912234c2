"""The calculator as a function of the client's: calls, results, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from scripted import ScriptedClient
from serving import serving

from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.conversation import ChatMessage, turns
from nanochat_ray.text.chat import render_conversation
from nanochat_ray.text.tokenizer import Tokenizer

TOK = Tokenizer.bytes_only()
START, END = TOK.special("<|python_start|>"), TOK.special("<|python_end|>")
USER = {"role": "user", "content": "12+7?"}
PARAMETERS = {
    "type": "object",
    "properties": {"expression": {"type": "string"}},
    "required": ["expression"],
}
TOOL = {"type": "function", "function": {"name": "calculator", "parameters": PARAMETERS}}
NAMED = {"type": "function", "function": {"name": "calculator"}}


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient([*TOK.encode("Well: "), START, *TOK.encode("12+7"), END])


@pytest.fixture
def client(engine: ScriptedClient) -> Iterator[openai.OpenAI]:
    with serving(build_app(engine, TOK, "tiny", 256)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    given = {"model": "tiny", "messages": [USER], "tools": [TOOL], **fields}
    return client.chat.completions.create(**given)


def test_a_call_and_its_result(client: openai.OpenAI, engine: ScriptedClient) -> None:
    answer = ask(client)
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Well: "
    (call,) = choice.message.tool_calls
    assert call.function.name == "calculator"
    assert json.loads(call.function.arguments) == {"expression": "12+7"}
    assert not engine.running

    engine.tokens = TOK.encode("It is 19.")
    result = {"role": "tool", "tool_call_id": call.id, "content": "19"}
    again = ask(client, messages=[USER, choice.message.model_dump(exclude_none=True), result])
    assert again.choices[0].message.content == "It is 19."
    assert again.choices[0].message.tool_calls is None
    # The prompt is what the model would have seen had the engine run the calculator.
    parts = [
        {"type": "text", "text": "Well: "},
        {"type": "python", "text": "12+7"},
        {"type": "python_output", "text": "19"},
    ]
    whole, _ = render_conversation(TOK, [USER, {"role": "assistant", "content": parts}])
    assert engine.requests[1].prompt == whole[:-1]


def test_a_streamed_call(client: openai.OpenAI) -> None:
    chunks = list(ask(client, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Well: "
    (last,) = [c.choices[0] for c in chunks if c.choices[0].finish_reason]
    assert last.finish_reason == "tool_calls"
    (call,) = last.delta.tool_calls
    assert (call.index, call.type, call.function.name) == (0, "function", "calculator")
    assert json.loads(call.function.arguments) == {"expression": "12+7"}


@pytest.mark.parametrize(("choice", "finish"), [("required", "tool_calls"), (NAMED, "stop")])
def test_a_forced_call(
    client: openai.OpenAI, engine: ScriptedClient, choice: Any, finish: str
) -> None:
    engine.tokens = [*TOK.encode("2*3"), END]
    found = ask(client, tool_choice=choice).choices[0]
    assert engine.requests[0].prompt[-1] == START
    assert found.message.content is None
    assert json.loads(found.message.tool_calls[0].function.arguments) == {"expression": "2*3"}
    assert found.finish_reason == finish


def test_no_call_when_none_is_wanted(client: openai.OpenAI, engine: ScriptedClient) -> None:
    ask(client, tool_choice="none")
    assert END not in engine.requests[0].params.stop_ids
    engine.tokens = TOK.encode("hi")
    assert ask(client).choices[0].finish_reason == "stop"


CALL = {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": "{"}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": [{**TOOL, "function": {"name": "weather"}}]}, "one function, calculator"),
        ({"tool_choice": {**NAMED, "function": {"name": "x"}}}, "not among tools"),
        ({"tools": [], "tool_choice": "required"}, "together with tools"),
        ({"messages": [USER, {"role": "tool", "content": "1"}]}, r"messages\[1\].tool_call_id"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, USER]},
            r"messages\[1\].tool_calls\[0\].function.arguments",
        ),
    ],
)
def test_refusals(client: openai.OpenAI, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(client, **fields)


def test_a_result_that_is_missing() -> None:
    function = {"name": "calculator", "arguments": '{"expression": "1+1"}'}
    called = {"role": "assistant", "tool_calls": [{"id": "c1", "function": function}]}
    messages = [ChatMessage.model_validate(m) for m in (USER, called)]
    with pytest.raises(ValueError, match="the result of the call 'c1' is missing"):
        turns(messages)
