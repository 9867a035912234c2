"""A real engine answers; the score counts what the grader accepts."""

from __future__ import annotations

import torch

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.evals.tasks import evaluate
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.chat import Message
from tests.tiny import TOKENIZER, tiny_config


class FirstLetter:
    """Right if the answer begins with the letter that the tiny model happens to say."""

    name = "letters"

    def __init__(self, accept: set[int], long: int = -1):
        self.accept, self.long = accept, long
        self.answers: dict[int, str] = {}

    def __len__(self) -> int:
        return 30

    def question(self, index: int) -> list[Message]:
        return [{"role": "user", "content": "x" * (200 if index == self.long else index)}]

    def example(self, index: int) -> list[Message]:
        return [*self.question(index), {"role": "assistant", "content": "y"}]

    def grade(self, index: int, answer: str) -> bool:
        self.answers[index] = answer
        return index in self.accept


def engine() -> Engine:
    model = GPT(tiny_config(sequence_len=64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    return Engine.from_model(model, TOKENIZER, EngineConfig(max_num_seqs=4))


def test_accuracy_counts_all_questions() -> None:
    task, one_engine = FirstLetter({1, 3, 25}, long=7), engine()
    progress_calls = []
    score = evaluate(
        one_engine,
        TOKENIZER,
        task,
        count=26,
        max_tokens=12,
        progress=lambda d, t: progress_calls.append((d, t)),
    )
    assert (score.correct, score.total, score.too_long) == (3, 26, 1)
    assert len(score.wrong) == 10
    assert progress_calls[-1] == (26, 26)
    assert task.answers[7] == ""  # it does not fit into the context: asked, not answered, wrong
    assert any(task.answers.values())
    one_engine.check_integrity()
    again = FirstLetter({1})
    evaluate(one_engine, TOKENIZER, again, count=5, max_tokens=12)
    assert all(again.answers[i] == task.answers[i] for i in range(5))
