"""Accuracy of a chat model on tasks, through the engines that serve it: greedy, or pass@k."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from nanochat_ray.engine.offline import OfflineEngine
from nanochat_ray.engine.request import Request
from nanochat_ray.evals.answers import answer_params, answer_text, make_requests, task_prompts
from nanochat_ray.evals.results import Z, wilson_interval
from nanochat_ray.tasks.task import MAX_ANSWER_TOKENS, Task, grade_answer, map_in_threads
from nanochat_ray.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class TaskScore:
    name: str
    num_right: list[int]
    """Right answers of each question, of ``samples``."""
    samples: int
    wrong: list[tuple[str, str]]
    """Up to ten (question, answer) that were not right."""
    too_long: int = 0
    """Questions that do not fit into the context: their answers count as wrong."""

    @property
    def total(self) -> int:
        return len(self.num_right)

    @property
    def correct(self) -> int:
        """Right answers of all questions."""
        return sum(self.num_right)

    @property
    def accuracy(self) -> float:
        """pass@1."""
        return self.pass_at(1)

    def pass_at(self, k: int) -> float:
        """Probability that one of ``k`` answers is right, without bias: 1 - C(n - c, k) / C(n, k)
        for c right of n (Chen et al., arXiv 2107.03374, equation 1)."""
        n = self.samples
        shares = [1 - math.comb(n - c, k) / math.comb(n, k) for c in self.num_right]
        return sum(shares) / max(self.total, 1)

    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the accuracy. The answers of one question are not independent,
        so with several the spread is that of the questions; if all are alike, Wilson's interval of
        as many single answers."""
        if self.samples == 1:
            return wilson_interval(self.correct, self.total)
        mean = self.accuracy
        if len(set(self.num_right)) == 1:  # by the counts: shares differ by their rounding
            return wilson_interval(mean * self.total, self.total)
        squares = sum((c / self.samples - mean) ** 2 for c in self.num_right)
        spread = Z * math.sqrt(squares / (self.total - 1) / self.total)
        return max(0.0, mean - spread), min(1.0, mean + spread)


def evaluate(
    engine: OfflineEngine,
    tokenizer: Tokenizer,
    task: Task,
    *,
    count: int,
    samples: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    max_tokens: int = MAX_ANSWER_TOKENS,
    grade_threads: int = 1,
    previous_answers: Mapping[str, str] | None = None,
    on_answer: Callable[[str, str], None] = lambda request_id, text: None,
    progress: Callable[[int, int], None] = lambda num_answered, total: None,
) -> TaskScore:
    """Asks the first ``count`` questions of ``task``, each ``samples`` times, and grades answers.

    A question that does not fit into the context counts as wrong. ``grade_threads`` answers are
    graded at once. ``previous_answers``: by request
    id, such as 3/0 for the first answer to the fourth question; these are not asked. ``on_answer``
    gets each other one when it is complete.
    """
    previous = dict(previous_answers or {})
    total = min(count, len(task))
    requests: list[Request] = []
    answers = {f"{index}/{i}": "" for index in range(total) for i in range(samples)} | previous
    num_too_long = 0
    params = answer_params(tokenizer, temperature=temperature, max_tokens=max_tokens)
    seeds = [(seed * samples + i) % 2**63 for i in range(samples)]
    for index, prompt in enumerate(task_prompts(task, tokenizer, total)):
        if len(prompt) >= engine.max_model_len:
            num_too_long += 1
            continue
        requests += make_requests(prompt, seeds, params, str(index))
    num_answered = len(previous) + samples * num_too_long
    for output in engine.run([r for r in requests if r.id not in previous]):
        text = answers[output.request_id] = answer_text(tokenizer, output.tokens)
        on_answer(output.request_id, text)
        num_answered += 1
        progress(num_answered, total * samples)
    texts = [answers[f"{index}/{i}"] for index in range(total) for i in range(samples)]
    indices = (i // samples for i in range(len(texts)))
    grades = map_in_threads(
        grade_threads, lambda i, text: grade_answer(task, i, text) >= 1, indices, texts
    )
    return _score(task, texts, grades, samples, num_too_long)


def _score(
    task: Task, texts: Sequence[str], grades: Sequence[bool], samples: int, too_long: int
) -> TaskScore:
    """``texts`` and ``grades`` of all answers, question by question."""
    num_right = []
    wrong: list[tuple[str, str]] = []
    for start in range(0, len(texts), samples):
        own_grades = grades[start : start + samples]
        num_right.append(sum(own_grades))
        if not all(own_grades) and len(wrong) < 10:
            text = texts[start + own_grades.index(False)]
            wrong.append((str(task.question(start // samples)[-1]["content"]), text))
    return TaskScore(task.name, num_right, samples, wrong, too_long)
