"""``/v1/responses``, with the official client."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from pydantic import BaseModel

from nanochat_ray.text.tokenizer import Tokenizer
from tests.serve.scripted import ScriptedClient
from tests.serve.serving import post

TOK = Tokenizer.bytes_only()
START, END = TOK.special("<|python_start|>"), TOK.special("<|python_end|>")
CALCULATOR = {
    "type": "function",
    "name": "calculator",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
}


@pytest.fixture
def engine() -> ScriptedClient:
    return ScriptedClient(TOK.encode("Grüße 🙂"))


def test_text_in_text_out(client: openai.OpenAI, engine: ScriptedClient) -> None:
    answer = client.responses.create(
        model="tiny", input="hi", instructions="Be kind.", metadata={"a": "b"}
    )
    assert (answer.output_text, answer.status) == ("Grüße 🙂", "completed")
    assert answer.completed_at >= answer.created_at
    assert answer.usage.input_tokens == len(engine.requests[0].prompt)
    assert answer.usage.output_tokens == len(engine.tokens) + 1
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert (answer.metadata, answer.instructions) == ({"a": "b"}, "Be kind.")
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "hi"}]
    client.chat.completions.create(model="tiny", messages=system)
    assert engine.requests[0].prompt == engine.requests[1].prompt


def test_events_tell_the_same_as_the_whole(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="tiny", input="hi", stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type.removeprefix("response.") for e in events]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert set(kinds[4:-4]) == {"output_text.delta"}
    ends = ["output_text.done", "content_part.done", "output_item.done", "completed"]
    assert kinds[-4:] == ends
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Grüße 🙂"
    final = events[-1].response
    assert final.output_text == events[-4].text == "Grüße 🙂"
    assert final.output[0].id == events[2].item.id == events[4].item_id
    assert final.usage.output_tokens == len(TOK.encode("Grüße 🙂")) + 1
    with client.responses.stream(model="tiny", input="hi") as stream:
        assert stream.get_final_response().output_text == "Grüße 🙂"


def test_answer_that_is_cut_is_incomplete(client: openai.OpenAI) -> None:
    answer = client.responses.create(model="tiny", input="hi", max_output_tokens=3)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.completed_at is None
    *_, last = client.responses.create(model="tiny", input="hi", max_output_tokens=3, stream=True)
    assert last.type == "response.incomplete"


def test_function_call_and_its_output(client: openai.OpenAI, engine: ScriptedClient) -> None:
    engine.tokens = [*TOK.encode("Well: "), START, *TOK.encode("12+7"), END]
    question: Any = {"role": "user", "content": [{"type": "input_text", "text": "12+7?"}]}
    answer = client.responses.create(model="tiny", input=[question], tools=[CALCULATOR])
    message, call = answer.output
    assert message.content[0].text == "Well: "
    assert (call.name, call.arguments) == ("calculator", '{"expression": "12+7"}')
    events = list(
        client.responses.create(model="tiny", input=[question], tools=[CALCULATOR], stream=True)
    )
    (last_event,) = [e for e in events if e.type == "response.function_call_arguments.done"]
    assert (last_event.arguments, last_event.output_index) == (call.arguments, 1)
    assert [item.type for item in events[-1].response.output] == ["message", "function_call"]
    items = [question, *(item.model_dump(exclude_none=True) for item in answer.output)]
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "19"})
    engine.tokens = TOK.encode("It is 19.")
    again = client.responses.create(model="tiny", input=items, tools=[CALCULATOR])
    assert again.output_text == "It is 19."
    prompt = TOK.decode([t for t in engine.requests[-1].prompt if t not in TOK.specials.values()])
    assert prompt == "12+7?Well: 12+719"


def test_parse_gives_the_schema_to_the_engine(
    client: openai.OpenAI, engine: ScriptedClient
) -> None:
    class Sum(BaseModel):
        total: int

    engine.tokens = TOK.encode('{"total":19}')
    assert client.responses.parse(model="tiny", input="x", text_format=Sum).output_parsed == Sum(
        total=19
    )
    grammar = engine.requests[-1].params.grammar
    assert grammar is not None
    assert "total" in grammar["json_schema"]["properties"]


def test_truncation_drops_the_oldest_turns(url: str, engine: ScriptedClient) -> None:
    items = [{"role": "system", "content": "S"}]
    for i in range(30):
        items.append({"role": "user", "content": f"question {i}"})
        items.append({"role": "assistant", "content": f"answer {i}"})
    items.append({"role": "user", "content": "the last"})
    refusal = post(f"{url}/v1/responses", json={"input": items})
    assert (refusal.status_code, refusal.json()["error"]["param"]) == (400, "input")
    body = {"input": items, "truncation": "auto"}
    assert post(f"{url}/v1/responses", json=body).status_code == 200
    text = TOK.decode([t for t in engine.requests[-1].prompt if t < 256])
    assert text.startswith("S\n\nquestion 2")
    assert text.endswith("answer 29the last")
    body = {"input": "x" * 300, "truncation": "auto"}
    assert post(f"{url}/v1/responses", json=body).status_code == 400


def test_truncation_drops_no_more_than_it_must(url: str, engine: ScriptedClient) -> None:
    items = [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y" * 60}]
    items += [{"role": "user", "content": "second"}, {"role": "assistant", "content": "answer"}]
    items += [{"role": "user", "content": "third"}]
    body = {"input": items, "truncation": "auto"}
    assert post(f"{url}/v1/responses", json=body).status_code == 200
    text = TOK.decode([t for t in engine.requests[-1].prompt if t < 256])
    assert text == "secondanswerthird"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{}] * 100_000}, "input[0].role"),
        ({"input": [{"role": "wizard", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, None),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "conversation": "c"}, "conversation"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "x", "tools": [5]}, "tools[0]"),
        ({"input": "x", "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"input": "x", "max_output_tokens": 0}, "max_output_tokens"),
        ({"input": "x", "max_output_tokens": -2}, "max_output_tokens"),
        ({"input": "x", "temperature": 3}, "temperature"),
        ({"input": "x", "metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"input": "x" * 300}, "input"),
    ],
)
def test_refusals_name_the_field(
    refusing_url: str, body: dict[str, Any], param: str | None
) -> None:
    response = post(f"{refusing_url}/v1/responses", json=body)
    error = response.json()["error"]
    assert response.status_code == 400, response.text
    if param is not None:
        assert error["param"] == param, error
    assert "messages" not in error["message"]


def test_refusals_name_the_item_that_was_sent(url: str) -> None:
    """Items are not messages: the instructions are one more, and calls belong to another's."""
    call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "a", "output": "messages"}
    user = {"role": "user", "content": "x"}
    body = {"instructions": "Be brief.", "input": [user, call, call, output, output]}
    error = post(f"{url}/v1/responses", json=body).json()["error"]
    assert error["message"].startswith("input[1].tool_calls[1].id='a' is not allowed")
    body["input"] = [user, {"role": "assistant", "content": "x"}, call, output, output]
    error = post(f"{url}/v1/responses", json=body).json()["error"]
    assert error["message"].startswith("input[4].tool_call_id='a' is not allowed")
    error = post(f"{url}/v1/responses", json={"input": [user] * 400}).json()["error"]
    assert "there are 400 messages" in error["message"]
    assert error["param"] == "input"


def test_tools_and_format_are_repeated(url: str, engine: ScriptedClient) -> None:
    engine.tokens = TOK.encode("{}")
    schema = {"type": "object", "properties": {}}
    body = {
        "input": "x",
        "tools": [{**CALCULATOR, "strict": True}],
        "tool_choice": {"type": "function", "name": "calculator"},
        "text": {"format": {"type": "json_schema", "name": "s", "schema": schema, "strict": True}},
    }
    answer = post(f"{url}/v1/responses", json=body).json()
    assert {name: answer[name] for name in ("tools", "tool_choice", "text")} == {
        name: body[name] for name in ("tools", "tool_choice", "text")
    }
    functions = [{"type": "function", "name": "calculator"}]
    body["tool_choice"] = {"type": "allowed_tools", "mode": "required", "tools": functions}
    assert post(f"{url}/v1/responses", json=body).json()["tool_choice"] == body["tool_choice"]
    assert engine.requests[-1].prompt[-1] == TOK.special("<|python_start|>")


def test_harmless_fields_are_ignored(url: str) -> None:
    body = {"input": "x", "store": True, "user": "u", "service_tier": "auto", "include": []}
    body |= {"reasoning": {"effort": "low"}, "stream_options": {"include_obfuscation": False}}
    assert post(f"{url}/v1/responses", json=body).json()["store"] is False


def test_engine_failure_is_an_event(client: openai.OpenAI, engine: ScriptedClient) -> None:
    engine.break_after = 2
    *_, last = client.responses.create(model="tiny", input="hi", stream=True)
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "engine_unavailable"


def test_logprobs_come_with_the_text(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="tiny", input="hi", top_logprobs=2, include=["message.output_text.logprobs"]
    )
    assert len(answer.output[0].content[0].logprobs) == len(TOK.encode("Grüße 🙂"))
