"""Each field of a body up to its bounds, fields that exclude each other, and unsupported ones."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from nanochat_ray.serve.openai.schema.requests import ChatRequest, CompletionRequest

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("temperature", [0, 2, 1.5], [-0.001, 2.001, "1", True]),
    ("top_p", [0.001, 1], [0, 1.001, -1]),
    ("top_k", [-1, 0, 2**31 - 1], [-2, 2**31, 1.5]),
    ("min_p", [0, 1], [-0.001, 1.001]),
    ("seed", [-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63, 0.5]),
    ("n", [1, 100], [0, -1, 1.5]),
    ("presence_penalty", [-2, 2], [-2.001, 2.001]),
    ("frequency_penalty", [-2, 2], [-2.001, 2.001]),
    ("repetition_penalty", [0.01, 100], [0.009, 100.1, 0]),
    ("logit_bias", [{"0": -100}, {"5": 100}], [{"0": 100.1}, {"0": -100.1}, {"a": 1}, {"-1": 1}]),
    ("max_tokens", [-1, 1, 2**31 - 1], [-2, 2**31, 1.5, True]),
    ("min_tokens", [0, 5, 2**31 - 1], [-1, 1.5, 2**31]),
    ("priority", [0, 9, 2**31 - 1], [-1, "1", 2**31]),
    ("stop", ["a", [], ["a"] * 16], ["", [""], ["a"] * 17, 5]),
    ("stop_token_ids", [[], [0], [5] * 16], [[-1], [5] * 17, ["a"]]),
    ("cache_salt", ["s"], ["", 5]),
    ("ignore_eos", [True, False], [1, "true"]),
    ("stream", [True, False], [1, "true"]),
    ("return_token_ids", [True, False], [1]),
    ("model", ["tiny"], [5]),
]
CHAT_BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("logprobs", [True, False], [1, 5]),
    ("top_logprobs", [0, 20], [-1, 21, True]),
    ("max_completion_tokens", [-1, 1], [0, -2]),
    ("messages", [CHAT["messages"]], [[], "hi"]),
]
COMPLETION_BOUNDS: list[tuple[str, list[Any], list[Any]]] = [
    ("logprobs", [0, 20], [-1, 21, True]),
    ("prompt_logprobs", [0, 20], [-1, 21, True]),
    ("best_of", [1, 9], [0, -1]),
    ("prompt", ["", ["a"] * 1024, [0], [[5]]], [[], ["a"] * 1025, [-1], [[]], 5, [["a"]]]),
    ("echo", [True, False], [1]),
]


@pytest.mark.parametrize(
    ("model", "base", "bounds"),
    [
        (ChatRequest, {**CHAT, "logprobs": True}, BOUNDS + CHAT_BOUNDS),
        (CompletionRequest, {"prompt": "x"}, BOUNDS + COMPLETION_BOUNDS),
    ],
)
def test_fields_to_their_bounds(model: Any, base: dict[str, Any], bounds: list[Any]) -> None:
    for field, values, others in bounds:
        for value in [*values, *([None] if field not in base else [])]:
            rest = {"top_logprobs": None} if field == "logprobs" else {}
            model.model_validate({**base, **rest, field: value})
        for value in others:
            with pytest.raises(ValidationError) as refusal:
                model.model_validate({**base, field: value})
            (first, *_) = refusal.value.errors()
            assert field in (first["loc"] or first["msg"].split()[2:3])[0], (field, value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options is only allowed together"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos and min_tokens are not allowed"),
        ({"guided_regex": "a", "min_tokens": 1}, "ignore_eos and min_tokens are not allowed"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice is not allowed together"),
    ],
)
def test_fields_that_exclude_each_other(fields: dict[str, Any], message: str) -> None:
    for model, base in ((ChatRequest, CHAT), (CompletionRequest, {"prompt": "x"})):
        with pytest.raises(ValidationError, match=message):
            model.model_validate({**base, **fields})


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (CompletionRequest, {"prompt_logprobs": 0, "stream": True}, "prompt_logprobs is not"),
        (CompletionRequest, {"max_tokens": 0}, "max_tokens=0 is only allowed together with echo"),
        (CompletionRequest, {"best_of": 1, "n": 2}, "best_of=1 is not allowed: at least n=2"),
        (CompletionRequest, {"best_of": 2, "stream": True}, "best_of=2 is not allowed together"),
        (ChatRequest, {"top_logprobs": 1}, "top_logprobs is only allowed together with logprobs"),
        (ChatRequest, {"max_tokens": 0}, "max_tokens=0 is not allowed: 1 or more"),
        (ChatRequest, {"continue_final_message": True, "add_generation_prompt": True},
         "continue_final_message=true is not allowed together with add_generation_prompt"),
    ],
)  # fmt: skip
def test_fields_of_one_endpoint_together(model: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        model.model_validate({**CHAT, "prompt": "x", **fields})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("return_tokens_as_token_ids", True),
        ("return_token_offsets", True),
        ("return_prompt_text", True),
        ("logprob_token_ids", [5]),
        ("repetition_detection", {"max_pattern_size": 3}),
        ("watermarking", {}),
    ],
)
def test_what_would_be_missing_is_refused(field: str, value: Any) -> None:
    for model, base in ((ChatRequest, CHAT), (CompletionRequest, {"prompt": "x"})):
        model.model_validate({**base, field: False if value is True else None})
        with pytest.raises(ValidationError, match=f"{field} is not supported"):
            model.model_validate({**base, field: value})


def test_chats_have_no_logprobs_of_the_prompt() -> None:
    CompletionRequest.model_validate({"prompt": "x", "prompt_logprobs": 1})
    with pytest.raises(ValidationError, match="prompt_logprobs is not supported"):
        ChatRequest.model_validate({**CHAT, "prompt_logprobs": 1})


@pytest.mark.parametrize("field", ["ignore_eos", "min_tokens"])
def test_a_forced_call_ends_by_itself(field: str) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {**CHAT, "tools": tools, field: 1 if field == "min_tokens" else True}
    ChatRequest.model_validate(body)
    with pytest.raises(ValidationError, match="ignore_eos and min_tokens are not allowed where"):
        ChatRequest.model_validate({**body, "tool_choice": "required"})


def test_best_of_may_equal_n_in_a_stream() -> None:
    body = CompletionRequest.model_validate({"prompt": "x", "best_of": 2, "n": 2, "stream": True})
    assert (body.num_candidates, body.num_logprobs) == (2, None)


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("add_special_tokens", None, True), ("allowed_token_ids", [], [1]), ("audio", None, {}),
        ("bad_words", [], ["a"]), ("chat_template", None, "x"),
        ("chat_template_kwargs", {}, {"a": 1}), ("documents", [], [{}]),
        ("function_call", "none", "auto"), ("functions", [], [{}]),
        ("include_stop_str_in_output", False, True), ("logits_processors", [], ["a"]),
        ("modalities", ["text"], ["audio"]), ("prompt_embeds", None, "x"),
        ("skip_special_tokens", True, False), ("suffix", "", "x"),
        ("truncate_prompt_tokens", None, 1), ("use_beam_search", False, True),
        ("web_search_options", None, {}),
    ],
)  # fmt: skip
def test_fields_that_are_not_supported(field: str, neutral: Any, other: Any) -> None:
    for model in (ChatRequest, CompletionRequest):
        body = {**CHAT, "prompt": "x"}
        model.model_validate({**body, field: neutral})
        with pytest.raises(ValidationError, match=f"{field} is not supported"):
            model.model_validate({**body, field: other})


def test_structured_outputs_have_one_kind() -> None:
    def grammar(**fields: Any) -> Any:
        body = {"prompt": "x", "structured_outputs": fields}
        return CompletionRequest.model_validate(body).grammar

    assert grammar(json_object=True) == {"json_object": True}
    assert grammar(json_object=False, regex="a") == {"regex": "a"}
    for fields in ({}, {"json_object": False}, {"json_object": True, "regex": "a"}):
        with pytest.raises(ValidationError, match="structured_outputs needs one of"):
            grammar(**fields)
