"""Answers to questions of tasks: how evals and RL sample them, and their text."""

from __future__ import annotations

from typing import Any

from nanochat_ray.engine.detokenizer import OutputProcessor, TextEvent, ToolResultEvent
from nanochat_ray.engine.request import SamplingParams
from nanochat_ray.text.tokenizer import Tokenizer


def answer_params(tokenizer: Tokenizer, **params: Any) -> SamplingParams:
    """``SamplingParams`` of an answer, which the end of the chat turn ends."""
    ends = (tokenizer.special("<|assistant_end|>"), tokenizer.bos)
    return SamplingParams(eos_ids=ends, **params)


def answer_text(tokenizer: Tokenizer, tokens: list[int], *, shows_tools: bool = False) -> str:
    """The text of a whole answer, as users see it and graders get it.

    Special tokens have no text. With ``shows_tools`` calls appear as ``[12*3 = 36]``.
    """
    processor = OutputProcessor(tokenizer)
    parts = []
    for event in [e for token in tokens for e in processor.push(token)] + processor.flush():
        if isinstance(event, TextEvent):
            parts.append(event.text)
        elif isinstance(event, ToolResultEvent) and shows_tools:
            parts.append(f"[{event.call} = {event.result}] ")
    return "".join(parts)
