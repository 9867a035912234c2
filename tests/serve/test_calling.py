"""Functions of the client's, and the calculator as one: calls, results, and refusals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from nanochat_ray.engine.grammar import Grammars
from nanochat_ray.engine.request import Request
from nanochat_ray.serve.app import build_app
from nanochat_ray.text.chat import render_conversation
from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import serving

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
    with serving(build_app(engine, TOK, "tiny", 1024)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def refused_client() -> Iterator[openai.OpenAI]:
    """Of a server for all refusals, none of which reaches its engine."""
    engine = ScriptedClient([65])
    with serving(build_app(engine, TOK, "tiny", 1024)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert not engine.requests


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    request_fields = {"model": "tiny", "messages": [USER], "tools": [TOOL], **fields}
    return client.chat.completions.create(**request_fields)


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
    values = ask(client, tool_choice=choice).choices[0]
    assert engine.requests[0].prompt[-1] == START
    assert values.message.content is None
    assert json.loads(values.message.tool_calls[0].function.arguments) == {"expression": "2*3"}
    assert values.finish_reason == finish


def test_no_call_when_none_is_wanted(client: openai.OpenAI, engine: ScriptedClient) -> None:
    ask(client, tool_choice="none")
    assert END not in engine.requests[0].params.stop_ids
    engine.tokens = TOK.encode("hi")
    assert ask(client).choices[0].finish_reason == "stop"


PLACE = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a place.",
        "parameters": {
            "properties": {"place": {"$ref": "#/$defs/Place"}, "days": {"enum": [1, 7]}},
            "required": ["place", "days"],
            "$defs": {"Place": PLACE},
        },
    },
}
PING = {"type": "function", "function": {"name": "ping"}}
WRITTEN = '{"name":"weather","arguments":{"place":{"name":"Köln {}"},"days":7}}'
ARGUMENTS = {"place": {"name": "Köln {}"}, "days": 7}
BY_NAME = {"type": "function", "function": {"name": "weather"}}


def follows(grammar: Any, text: str) -> bool:
    grammars = Grammars([TOK.decode_bytes([i]) for i in range(256)], 256)
    state = grammars.start(grammar, [])
    return state.feed(TOK.encode(text)) and state.matcher.is_accepting()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("choice", "finish"), [("required", "tool_calls"), (BY_NAME, "stop")])
def test_any_function_can_be_forced(
    client: openai.OpenAI, engine: ScriptedClient, choice: Any, finish: str, stream: bool
) -> None:
    engine.tokens = TOK.encode(WRITTEN)
    payload = {"tools": [PING, WEATHER, TOOL], "tool_choice": choice, "parallel_tool_calls": False}
    answer = ask(client, **payload, stream=stream)
    if stream:
        choices = [c.choices[0] for c in answer]
        calls = [c.delta.tool_calls[0] for c in choices if c.delta.tool_calls]
        assert len(calls) > 10  # the arguments come as they are written
        assert [c.id is not None for c in calls] == [True] + [False] * (len(calls) - 1)
        assert calls[0].function.name == "weather"
        call_text = "".join(c.function.arguments for c in calls)
        assert choices[-1].finish_reason == finish
    else:
        (values,) = answer.choices
        (call,) = values.message.tool_calls
        assert (call.function.name, values.finish_reason) == ("weather", finish)
        assert values.message.content is None
        call_text = call.function.arguments
    assert json.loads(call_text) == ARGUMENTS
    request = engine.requests[0]
    assert request.prompt[-1] == START
    grammar = request.params.grammar
    assert follows(grammar, WRITTEN)
    assert not follows(grammar, WRITTEN.replace("7", "8"))
    assert not follows(grammar, WRITTEN.replace('"days":7', '"days":7,"more":1'))
    assert follows(grammar, '{"name":"ping","arguments":{}}') == (choice == "required")
    assert Request.from_wire(request.to_wire()).params.grammar == grammar


def allow(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def test_only_allowed_functions_are_called(client: openai.OpenAI, engine: ScriptedClient) -> None:
    tools = [PING, WEATHER, TOOL]
    engine.tokens = TOK.encode(WRITTEN)
    (values,) = ask(client, tools=tools, tool_choice=allow("required", "weather")).choices
    assert (values.message.tool_calls[0].function.name, values.finish_reason) == (
        "weather",
        "tool_calls",
    )
    assert not follows(engine.requests[0].params.grammar, '{"name":"ping","arguments":{}}')
    engine.tokens = [START, *TOK.encode(WRITTEN), END]
    for name, is_call in (("weather", True), ("ping", False)):
        (values,) = ask(client, tools=tools, tool_choice=allow("auto", name)).choices
        assert bool(values.message.tool_calls) == is_call
    # The prompt, and so its prefix in the cache, is that of all tools.
    ask(client, tools=tools)
    assert engine.requests[1].prompt == engine.requests[2].prompt == engine.requests[3].prompt


def test_a_forced_call_that_is_cut(client: openai.OpenAI, engine: ScriptedClient) -> None:
    engine.tokens = TOK.encode(WRITTEN)
    head = len(TOK.encode(WRITTEN.partition(',"days')[0]))
    values = ask(client, tools=[WEATHER], tool_choice="required", max_tokens=head).choices[0]
    assert values.finish_reason == "length"
    assert values.message.tool_calls[0].function.arguments == '{"place":{"name":"Köln {}"}'


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_of_the_models_own_accord(
    client: openai.OpenAI, engine: ScriptedClient, stream: bool
) -> None:
    engine.tokens = [*TOK.encode("So: "), START, *TOK.encode(WRITTEN), END, *TOK.encode("more")]
    answer = ask(client, tools=[WEATHER], stream=stream, stop=[": no"])
    choices = [c.choices[0] for c in answer] if stream else answer.choices
    texts = [c.delta if stream else c.message for c in choices]
    assert "".join(m.content or "" for m in texts) == "So: "
    ((call,),) = [m.tool_calls for m in texts if m.tool_calls]
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == ARGUMENTS
    assert choices[-1].finish_reason == "tool_calls"
    assert engine.aborts == [engine.requests[0].id]

    result = {"role": "tool", "tool_call_id": call.id, "content": "wet"}
    call_message = {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]}
    engine.tokens = TOK.encode("Wet.")
    again = ask(client, tools=[WEATHER], messages=[USER, call_message, result])
    assert again.choices[0].message.content == "Wet."
    prompt_text = TOK.decode(engine.requests[1].prompt)
    assert prompt_text.endswith(f"{WRITTEN}<|python_end|><|output_start|>wet<|output_end|>")


def test_the_calculator_runs_beside_functions(
    client: openai.OpenAI, engine: ScriptedClient
) -> None:
    out = [TOK.special("<|output_start|>"), *TOK.encode("19"), TOK.special("<|output_end|>")]
    engine.tokens = [START, *TOK.encode("12+7"), END, *out, *TOK.encode("19.")]
    values = ask(client, tools=[WEATHER]).choices[0]
    assert (values.message.content, values.finish_reason) == ("19.", "stop")
    assert values.message.calculator == [{"expression": "12+7", "result": "19"}]
    # Where a client declares it, an expression is a call of the client's.
    assert ask(client, tools=[WEATHER, TOOL]).choices[0].message.tool_calls


CALL = {"id": "c1", "type": "function", "function": {"name": "calculator", "arguments": "{"}}


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": [{**TOOL, "function": {"name": ""}}]}, r"tools\[0\].function.name"),
        (
            {"tool_choice": "required", "tools": [WEATHER], "extra_body": {"min_tokens": 2}},
            "min_tokens",
        ),
        ({"tool_choice": {**NAMED, "function": {"name": "x"}}}, "not among tools"),
        ({"tools": [], "tool_choice": "required"}, "together with tools"),
        ({"tools": [], "tool_choice": allow("auto", "x")}, "together with tools"),
        ({"tool_choice": allow("auto", "calculator", "x")}, "tool_choice='x' .*not among tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function: Field required"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools: Field required"),
        ({"tool_choice": allow("auto")}, "tool_choice.allowed_tools.tools"),
        ({"tool_choice": allow("none", "calculator")}, "tool_choice.allowed_tools.mode"),
        ({"tool_choice": {"type": "x"}}, "type='x' is not allowed: 'function' or 'allowed_tools'"),
        ({"messages": [USER, {"role": "tool", "content": "1"}]}, r"messages\[1\].tool_call_id"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, USER]},
            r"messages\[1\].tool_calls\[0\].function.arguments",
        ),
    ],
)
def test_refusals(refused_client: openai.OpenAI, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(openai.BadRequestError, match=says):
        ask(refused_client, **fields)


def test_a_missing_result_is_refused(client: openai.OpenAI) -> None:
    function = {"name": "calculator", "arguments": '{"expression": "1+1"}'}
    message = {"role": "assistant", "tool_calls": [{"id": "c1", "function": function}]}
    with pytest.raises(openai.BadRequestError, match="the result of the call 'c1' is missing"):
        ask(client, messages=[USER, message])
