"""Answers to questions of tasks: how evals and RL sample them, and their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nanochat_ray.engine.detokenizer import OutputProcessor, TextEvent, ToolResultEvent
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.tasks.task import Task
from nanochat_ray.text.chat import render_prompt
from nanochat_ray.text.tokenizer import Tokenizer


def task_prompts(task: Task, tokenizer: Tokenizer, count: int | None = None) -> list[list[int]]:
    """Token ids of the first ``count`` questions, by default all. ValueError for one that is no
    conversation."""
    prompts = []
    for index in range(len(task) if count is None else count):
        try:
            prompts.append(render_prompt(tokenizer, task.question(index)))
        except ValueError as error:
            raise ValueError(f"task={task.name!r}, question {index}: {error}") from error
    return prompts


def answer_params(tokenizer: Tokenizer, **params: Any) -> SamplingParams:
    """``SamplingParams`` of an answer, which the end of the chat turn ends."""
    ends = (tokenizer.special("<|assistant_end|>"), tokenizer.bos)
    return SamplingParams(eos_ids=ends, **params)


def make_requests(
    prompt: Sequence[int], seeds: Sequence[int], params: SamplingParams, name: str
) -> list[Request]:
    """A request for each seed, with ``params`` otherwise; ids begin with ``name``."""
    return [
        Request(id=f"{name}/{sample}", prompt=prompt, params=replace(params, seed=seed))
        for sample, seed in enumerate(seeds)
    ]


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
