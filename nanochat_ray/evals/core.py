"""CORE (Li et al., DCLM, arXiv 2406.11794): 22 tasks for base models, answered by likelihood.

Decisions are those of nanochat's ``core_eval.py``: the same order of examples, the same shots, the
same token ranges. The engine scores only the tokens that decide, and shares the rest of a question
between its choices through the prefix cache.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.offline import OfflineEngine
from nanochat_ray.engine.request import Request, SamplingParams, TokenLogprob
from nanochat_ray.evals.core_data import CoreTask, Example
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.text.tokenizer import Tokenizer

ORDER_SEED, SHOT_SEED = 1337, 1234
CONTEXTS = 10
"""Positions that nanochat evaluates, as a multiple of the training's: prompts with ten shots are
longer than its context, and attention slides over them."""
LEAST_TOKENS = 32
"""Of a text, nearly always: a step has room for no more sequences than this allows."""


@dataclass(frozen=True)
class Option:
    """One text whose tokens ``[start, len(token_ids))`` are scored."""

    token_ids: list[int]
    start: int


@dataclass(frozen=True)
class Question:
    options: list[Option]
    answer: int | None
    """Index of the right option; None: the tokens of the only one must be the likeliest ones."""


@dataclass(frozen=True)
class CoreScore:
    label: str
    correct: int
    total: int
    baseline: float
    num_cropped: int = 0
    """Of ``total``, those that lost their first tokens to fit into the context."""

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def centered_accuracy(self) -> float:
        """0 for random answers, 1 for right ones."""
        return (self.accuracy - self.baseline) / (1 - self.baseline)

    @property
    def accuracy_error(self) -> float:
        """Standard error of the accuracy, a binomial share."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.total)

    @property
    def standard_error(self) -> float:
        """Of ``centered_accuracy``."""
        return self.accuracy_error / (1 - self.baseline)


def core_metric(scores: Sequence[CoreScore]) -> tuple[float, float]:
    """The mean of the centered accuracies, and its standard error."""
    mean = sum(s.centered_accuracy for s in scores) / len(scores)
    return mean, math.sqrt(sum(s.standard_error**2 for s in scores)) / len(scores)


def core_engine_config(model: ModelConfig, config: EngineConfig) -> EngineConfig:
    """That of an engine for ``evaluate``, whose context is nanochat's unless
    ``config.max_model_len`` says another.

    It touches little memory, since the system takes longer to hand out a new page than a model of
    this size takes to fill it: as many slots as fill a step, and a prefix cache for the questions
    that run, not for those before them, unless ``config.prefix_cache_tokens`` says another.
    """
    length = config.max_model_len or CONTEXTS * model.sequence_len
    cache_tokens = config.prefix_cache_tokens
    num_seqs = max(1, config.max_num_batched_tokens // LEAST_TOKENS)
    return replace(
        config,
        max_model_len=length,
        max_num_seqs=min(config.max_num_seqs, num_seqs),
        prefix_cache_tokens=2 * length if cache_tokens is None else cache_tokens,
    )


def choose(examples: Sequence[Example], count: int = 0) -> list[Example]:
    """The examples in the order of the evaluation, the first ``count`` of them (0: all)."""
    selection = list(examples)
    random.Random(ORDER_SEED).shuffle(selection)
    return selection[: count or None]


def texts(task: CoreTask, example: Example, shots: Sequence[Example]) -> list[str]:
    """The texts of a question's options; with ``language_modeling`` that of the question alone,
    then with its continuation."""
    if task.kind == "multiple_choice":
        heads, tails = [example["query"]] * len(example["choices"]), example["choices"]
        solutions = [(s["query"], s["choices"][s["gold"]]) for s in shots]
    elif task.kind == "schema":
        heads = example["context_options"]
        tails = [example["continuation"]] * len(heads)
        solutions = [(s["context_options"][s["gold"]], s["continuation"]) for s in shots]
    else:
        heads, tails = [example["context"].strip()] * 2, ["", example["continuation"]]
        solutions = [(s["context"].strip(), s["continuation"]) for s in shots]
    before = "".join(f"{head}{task.delimiter}{tail}\n\n" for head, tail in solutions)
    whole = [
        f"{before}{head}{task.delimiter}{tail}" for head, tail in zip(heads, tails, strict=True)
    ]
    if task.kind == "language_modeling":
        # Else the delimiter's space would be a token of its own, and no prefix of the whole text.
        whole[0] = whole[0].strip()
    return whole


def question(
    task: CoreTask, tokenizer: Tokenizer, examples: Sequence[Example], index: int
) -> Question:
    """The question of ``examples[index]``, with other examples as shots."""
    shots: list[Example] = []
    if task.num_shots:
        others = [i for i in range(len(examples)) if i != index]
        selection = random.Random(SHOT_SEED + index).sample(others, task.num_shots)
        shots = [examples[i] for i in selection]
    example = examples[index]
    ids = [[tokenizer.bos, *tokenizer.encode(t)] for t in texts(task, example, shots)]
    if task.kind == "language_modeling":
        head, whole = ids
        if whole[: len(head)] != head or len(whole) == len(head):
            raise ValueError(f"{task.label}: the tokens of example {index} do not begin its answer")
        return Question([Option(whole, len(head))], None)
    gold: int = example["gold"]
    if task.kind == "multiple_choice":
        start = _common_length(ids)
        return Question([Option(option, start) for option in ids], gold)
    suffix = _common_length([option[::-1] for option in ids])
    return Question([Option(option, len(option) - suffix) for option in ids], gold)


def _common_length(sequences: Sequence[Sequence[int]]) -> int:
    """Tokens that all sequences begin with."""
    shortest = min(map(len, sequences))
    first = sequences[0]
    return next((i for i in range(shortest) if any(s[i] != first[i] for s in sequences)), shortest)


def _crop(option: Option, length: int) -> Option:
    """The last ``length`` tokens, at least one of which is not scored."""
    surplus = max(0, len(option.token_ids) - length)
    return Option(option.token_ids[surplus:], max(1, option.start - surplus))


def is_right(question: Question, scores: Sequence[Sequence[TokenLogprob]]) -> bool:
    """``scores``: log-probabilities of the scored tokens of each option."""
    if question.answer is None:
        (option,), (logprobs,) = question.options, scores
        tokens = option.token_ids[option.start :]
        return all(p.top[0][0] == token for p, token in zip(logprobs, tokens, strict=True))
    # An option without tokens of its own has no mean: as in the reference it is never the least,
    # unless it is the first.
    losses = [
        -sum(p.logprob for p in logprobs) / len(logprobs) if logprobs else math.nan
        for logprobs in scores
    ]
    return losses.index(min(losses)) == question.answer


def evaluate(
    engine: OfflineEngine,
    tokenizer: Tokenizer,
    task: CoreTask,
    examples: Sequence[Example],
    *,
    progress: Callable[[int, int], None] = lambda num_answered, total: None,
) -> tuple[CoreScore, list[bool]]:
    """Score of a task over ``examples`` (see ``choose``), and whether each one is right.

    Questions longer than the engine's context lose their first tokens.
    """
    decisions: list[bool] = []
    num_cropped = 0
    for index, (item, scores, is_cropped) in enumerate(
        _scores_of(engine, (question(task, tokenizer, examples, i) for i in range(len(examples))))
    ):
        decisions.append(is_right(item, scores))
        num_cropped += is_cropped
        progress(index + 1, len(examples))
    return CoreScore(
        task.label, sum(decisions), len(decisions), task.baseline, num_cropped
    ), decisions


def _scores_of(
    engine: OfflineEngine, questions: Iterator[Question]
) -> Iterator[tuple[Question, list[list[TokenLogprob]], bool]]:
    """Each question, in order, with the scores of its options, and whether it was cropped.

    The options of a question are submitted one after the other, so that they share its prefix.
    """
    pending: dict[int, tuple[Question, bool]] = {}
    scores: dict[str, list[TokenLogprob]] = {}
    next_index = 0

    def requests() -> Iterator[Request]:
        for number, item in enumerate(questions):
            options = [_crop(option, engine.max_model_len) for option in item.options]
            is_cropped = any(o != c for o, c in zip(item.options, options, strict=True))
            pending[number] = Question(options, item.answer), is_cropped
            for i, option in enumerate(options):
                # A token more than the prompt has would not fit, and none is needed.
                params = SamplingParams(
                    temperature=0.0,
                    max_tokens=0,
                    prompt_logprobs=int(item.answer is None),
                    prompt_logprobs_start=option.start,
                )
                yield Request(id=f"{number}/{i}", prompt=option.token_ids, params=params)

    for output in engine.run(requests()):
        scores[output.request_id] = output.prompt_logprobs or []
        while next_index in pending:
            item, is_cropped = pending[next_index]
            ids = [f"{next_index}/{i}" for i in range(len(item.options))]
            if not all(id in scores for id in ids):
                break
            del pending[next_index]
            next_index += 1
            yield item, [scores.pop(id) for id in ids], is_cropped
