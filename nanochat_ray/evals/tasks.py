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
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TaskScore:
    """Asks the first ``count`` questions of ``task``, greedily, and grades what is answered.

    The engine is this function's alone while it runs. A question that does not fit into the
    context counts as wrong.
    """
    total = min(count, len(task))
    ends = (tokenizer.special("<|assistant_end|>"), tokenizer.bos)
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, eos_ids=ends)
    streams: dict[str, IncrementalDetokenizer] = {}
    said: dict[str, str] = {}
    waiting = list(range(total))
    done = too_long = 0
    while waiting or engine.has_work:
        # A full batch and as much again in the queue keeps every slot busy.
        while waiting and len(streams) < 2 * engine.config.max_num_seqs:
            index = waiting.pop(0)
            prompt = render_prompt(tokenizer, task.question(index))
            request = Request(id=str(index), prompt=prompt, params=params)
            said[request.id] = ""
            try:
                engine.add(request)
            except ValueError:
                done += 1
                too_long += 1
                continue
            streams[request.id] = IncrementalDetokenizer(tokenizer)
        for output in engine.step():
            stream = streams[output.request_id]
            said[output.request_id] += stream.add(output)
            if output.finish is not None:
                said[output.request_id] += stream.flush()
                del streams[output.request_id]
                done += 1
                progress(done, total)
    right = [task.grade(index, said[str(index)]) for index in range(total)]
    wrong = [
        (str(task.question(index)[-1]["content"]), said[str(index)])
        for index, ok in enumerate(right)
        if not ok
    ]
    return TaskScore(task.name, sum(right), total, wrong[:10], too_long)
