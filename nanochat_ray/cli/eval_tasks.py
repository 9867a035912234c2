"""``nanochat-ray eval --tasks``: accuracy and pass@k of a chat model, task by task."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nanochat_ray.cli.eval_core import print_progress
from nanochat_ray.evals.results import Results, engine_settings
from nanochat_ray.tasks.own import OwnTask
from nanochat_ray.tasks.task import Task
from nanochat_ray.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from nanochat_ray.cli.eval import Args
    from nanochat_ray.engine.offline import OfflineEngine


def task_figures(
    args: Args, engine: OfflineEngine, tokenizer: Tokenizer, tasks: Sequence[Task], results: Results
) -> dict[str, Any]:
    """Measures each task, unless its figures are stored already."""
    accuracy, questions, pass_at_k = {}, {}, {}
    for task in tasks:
        settings = _settings(args, engine, task)
        start = time.perf_counter()
        figures = results.find("tasks", task.name, settings)
        is_new = figures is None
        if figures is None:
            figures = _measure(args, engine, tokenizer, task, settings, results)
            results.store("tasks", task.name, settings, figures)
        _print(task.name, figures, args, time.perf_counter() - start if is_new else None)
        accuracy[task.name], questions[task.name] = figures["accuracy"], figures["total"]
        pass_at_k[task.name] = figures[f"pass@{args.samples}"]
    result: dict[str, Any] = {"accuracy": accuracy, "questions": questions}
    return result | ({"pass_at_k": pass_at_k} if args.samples > 1 else {})


def _settings(args: Args, engine: OfflineEngine, task: Task) -> dict[str, Any]:
    total = min(args.count, len(task))
    # With what grades: the reference answers, and the code of an own task.
    examples = json.dumps([(task.question(i), task.example(i)) for i in range(total)])
    examples += task.source_digest() if isinstance(task, OwnTask) else ""
    return {
        "questions": args.count,
        "sha256": hashlib.sha256(examples.encode()).hexdigest(),
        "samples": args.samples,
        "temperature": args.temperature,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
        **engine_settings(engine),
    }


def _measure(
    args: Args,
    engine: OfflineEngine,
    tokenizer: Tokenizer,
    task: Task,
    settings: dict[str, Any],
    results: Results,
) -> dict[str, Any]:
    from nanochat_ray.evals.tasks import evaluate

    answers = results.answers(task.name, settings)
    if answers.texts:
        print(f"{task.name}: {len(answers.texts)} answers are there already", flush=True)
    try:
        score = evaluate(
            engine,
            tokenizer,
            task,
            count=args.count,
            samples=args.samples,
            temperature=args.temperature or 0.0,
            seed=args.seed,
            grade_threads=args.grade_threads,
            max_tokens=args.max_tokens,
            previous_answers=answers.texts,
            on_answer=answers.add,
            progress=print_progress(task.name),
        )
    finally:  # a grader that raises costs no answer
        answers.save()
    return {
        "correct": score.correct,
        "total": score.total,
        "accuracy": score.accuracy,
        f"pass@{args.samples}": score.pass_at(args.samples),
        "interval": list(score.interval()),
        "too_long": score.too_long,
        "wrong": score.wrong,
    }


def _print(name: str, figures: dict[str, Any], args: Args, seconds: float | None) -> None:
    """``seconds``: None if it was measured before."""
    notes = "measured before" if seconds is None else f"in {seconds:.1f} s"
    if args.samples > 1:
        notes += f"; pass@{args.samples} {figures[f'pass@{args.samples}']:.1%}"
    if figures["total"] < args.count:
        notes += f"; the task has no more than {figures['total']} questions"
    if figures["too_long"]:
        notes += f"; {figures['too_long']} do not fit into the context and count as wrong"
    low, high = figures["interval"]
    print(
        f"{name:<18} {figures['correct']}/{figures['total'] * args.samples} right "
        f"({figures['accuracy']:.1%}, 95% interval {low:.1%} to {high:.1%}), {notes}",
        flush=True,
    )
    for question, answer in figures["wrong"][: args.show_wrong]:
        print(f"    wrong: {question!r} → {answer!r}")
