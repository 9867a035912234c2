"""What an answer says, and what ends it."""

from __future__ import annotations

from nanochat_ray.evals.answers import answer_params, answer_text
from nanochat_ray.text.chat import tool_delimiters
from tests.tiny import TOKENIZER

END = TOKENIZER.special("<|assistant_end|>")


def test_the_token_that_ends_an_answer_is_no_text() -> None:
    assert answer_text(TOKENIZER, [*b"so", TOKENIZER.bos]) == "so"
    assert answer_text(TOKENIZER, [*b"so", END]) == "so"
    assert answer_text(TOKENIZER, [*b"so"]) == "so"


def test_calls_are_shown_to_people_only() -> None:
    ids = tool_delimiters(TOKENIZER)
    call = [ids.call_start, *b"1+2", ids.call_end, ids.result_start, *b"3", ids.result_end]
    tokens = [*call, *b"so 3"]
    assert answer_text(TOKENIZER, tokens) == "so 3"
    assert answer_text(TOKENIZER, tokens, shows_tools=True) == "[1+2 = 3] so 3"
    assert answer_text(TOKENIZER, [*b"x", *call[:3], END]) == "x"


def test_the_end_of_a_turn_ends_an_answer() -> None:
    params = answer_params(TOKENIZER, temperature=0.5, max_tokens=7)
    assert params.all_stop_ids == {END, TOKENIZER.bos}
    assert (params.temperature, params.max_tokens) == (0.5, 7)
