"""Tokens of an answer as typed events: text, tool calls, tool results."""

from __future__ import annotations

import pytest

from nanochat_ray.engine.detokenizer import (
    Event,
    OutputProcessor,
    TextEvent,
    ToolCallEvent,
    ToolResultEvent,
)
from nanochat_ray.text.chat import tool_delimiters
from nanochat_ray.text.tokenizer import Tokenizer

TOK = Tokenizer.bytes_only()
IDS = tool_delimiters(TOK)
CALL = [IDS.call_start, *TOK.encode("1+1"), IDS.call_end]
RESULT = [IDS.result_start, *TOK.encode("2"), IDS.result_end]


def events(processor: OutputProcessor, tokens: list[int]) -> list[Event]:
    return [event for token in tokens for event in processor.push(token)]


def test_a_calculation_is_a_call_and_a_result() -> None:
    tokens = [*TOK.encode("a"), *CALL, *RESULT, *TOK.encode("b")]
    assert events(OutputProcessor(TOK), tokens) == [
        TextEvent("a"),
        ToolCallEvent("1+1", is_complete=True),
        ToolResultEvent("1+1", "2"),
        TextEvent("b"),
    ]


def test_a_call_that_another_delimiter_cuts_is_no_event() -> None:
    tokens = [IDS.call_start, *TOK.encode("1"), TOK.bos, *TOK.encode("b")]
    assert events(OutputProcessor(TOK), tokens) == [TextEvent("b")]


@pytest.mark.parametrize(
    "tokens",
    [
        [IDS.call_end],
        [IDS.result_end],
        [IDS.result_start, *TOK.encode("2"), IDS.call_end],
        [IDS.call_start, *TOK.encode("2"), IDS.result_end],
    ],
)
def test_an_end_without_its_start_is_no_event(tokens: list[int]) -> None:
    assert events(OutputProcessor(TOK), [*tokens, *TOK.encode("b")]) == [TextEvent("b")]


def test_a_forced_call_is_streamed() -> None:
    processor = OutputProcessor(TOK, begins_in_call=True, streams_call=True)
    assert events(processor, [*TOK.encode("{é"), IDS.call_end]) == [
        ToolCallEvent("{", is_complete=False),
        ToolCallEvent("", is_complete=False),
        ToolCallEvent("é", is_complete=False),
        ToolCallEvent("", is_complete=True),
    ]


@pytest.mark.parametrize("min_tokens", [2, 3])
def test_a_stop_string_ends_the_text_after_min_tokens(min_tokens: int) -> None:
    """The first is complete with token 2, the second with token 4."""
    processor = OutputProcessor(TOK, ["cd"], min_tokens=min_tokens)
    assert events(processor, TOK.encode("cdcdx")) == [TextEvent(t) for t in ("", "cd", "", "", "")]
    assert processor.is_stopped


def test_pending_text_comes_with_flush() -> None:
    processor = OutputProcessor(TOK, ["stop"])
    assert events(processor, TOK.encode("st")) == [TextEvent(""), TextEvent("")]
    assert processor.flush() == [TextEvent("st")]


def test_an_unfinished_call_comes_with_flush() -> None:
    processor = OutputProcessor(TOK, begins_in_call=True, streams_call=True)
    assert events(processor, TOK.encode("é")[:1]) == [ToolCallEvent("", is_complete=False)]
    assert processor.flush() == [TextEvent(""), ToolCallEvent("�", is_complete=False)]
