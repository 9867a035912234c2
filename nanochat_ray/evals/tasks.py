"""Exact-match accuracy of a chat model on tasks, through the engine that serves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanochat_ray.engine.detokenizer import IncrementalDetokenizer
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.tasks.task import Task
from nanochat_ray.text.chat import render_prompt
from nanochat_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TaskScore:
    name: str
    correct: int
    total: int
    wrong: list[tuple[str, str]]
    """Up to ten (question, answer) that were not right."""
    too_long: int = 0
    """Of ``total``, those that do not fit into the context: they count as wrong."""

    @property
    def accuracy(self) -> float:
        return self.correct / max(self.total, 1)


def evaluate(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    *,
    count: int,
    max_tokens: int = 128,
    progress: Callable[[int, int], None] = lambda num_answered, total: None,
) -> TaskScore:
    """Asks the first ``count`` questions of ``task``, greedily, and grades what is answered.

    The engine is this function's alone while it runs. A question that does not fit into the
    context counts as wrong.
    """
    total = min(count, len(task))
    ends = (tokenizer.special("<|assistant_end|>"), tokenizer.bos)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, eos_ids=ends)
    detokenizers: dict[str, IncrementalDetokenizer] = {}
    answers: dict[str, str] = {}
    waiting = list(range(total))
    num_answered = too_long = 0
    while waiting or engine.has_work:
        # A full batch and as much again in the queue keeps every slot busy.
        while waiting and len(detokenizers) < 2 * engine.config.max_num_seqs:
            index = waiting.pop(0)
            prompt = render_prompt(tokenizer, task.question(index))
            request = Request(id=str(index), prompt=prompt, params=params)
            answers[request.id] = ""
            try:
                engine.add(request)
            except ValueError:
                num_answered += 1
                too_long += 1
                continue
            detokenizers[request.id] = IncrementalDetokenizer(tokenizer)
        for output in engine.step():
            detokenizer = detokenizers[output.request_id]
            answers[output.request_id] += detokenizer.add(output)
            if output.finish is not None:
                answers[output.request_id] += detokenizer.flush()
                del detokenizers[output.request_id]
                num_answered += 1
                progress(num_answered, total)
    right = [task.grade(index, answers[str(index)]) for index in range(total)]
    wrong = [
        (str(task.question(index)[-1]["content"]), answers[str(index)])
        for index, ok in enumerate(right)
        if not ok
    ]
    return TaskScore(task.name, sum(right), total, wrong[:10], too_long)
