"""``nanochat-ray eval --core``: the CORE metric of a base model, task by task."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanochat_ray.evals import core_data
from nanochat_ray.evals.results import Results, engine_settings
from nanochat_ray.storage import cache_root

if TYPE_CHECKING:
    from nanochat_ray.engine.offline import OfflineEngine
    from nanochat_ray.evals.core import CoreScore
    from nanochat_ray.text.tokenizer import Tokenizer

PROGRESS_S = 10.0


def core_figures(
    engine: OfflineEngine, tokenizer: Tokenizer, source: str, count: int, results: Results
) -> dict[str, Any]:
    """Measures the tasks whose files ``source`` has, with ``count`` questions of each (0: all)."""
    from nanochat_ray.evals.core import core_metric

    paths = core_data.find_files(source, cache_root() / "evals")
    tasks = [task for task in core_data.TASKS if task.file in paths]
    scores = []
    for task in tasks:
        path = paths[task.file]
        settings = {
            "questions": count,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            **engine_settings(engine),
        }
        start = time.perf_counter()
        score, is_new = _measure(engine, tokenizer, task, path, count, settings, results)
        notes = f"in {time.perf_counter() - start:.1f} s" if is_new else "measured before"
        if score.num_cropped:
            notes += f"; {score.num_cropped} longer than the context lost their first tokens"
        print(
            f"{task.label:<32} {score.accuracy:6.1%} ± {1.96 * score.accuracy_error:5.1%} of "
            f"{score.total}, centered {score.centered_accuracy:6.3f}, {notes}",
            flush=True,
        )
        scores.append(score)
    missing = [task.label for task in core_data.TASKS if task.file not in paths]
    mean, error = core_metric(scores)
    share = f" over {len(tasks)} of {len(core_data.TASKS)} tasks" if missing else ""
    print(f"CORE{share}: {mean:.4f} ± {1.96 * error:.4f}", flush=True)
    if missing:
        print(f"no files of: {', '.join(missing)}", flush=True)
    tasks_json = {
        s.label: {"accuracy": s.accuracy, "centered": s.centered_accuracy} for s in scores
    }
    # The name is for the whole metric only.
    name = "core_of_some_tasks" if missing else "core"
    return {name: mean, "core_standard_error": error, "core_tasks": tasks_json}


def _measure(
    engine: OfflineEngine,
    tokenizer: Tokenizer,
    task: core_data.CoreTask,
    path: Any,
    count: int,
    settings: dict[str, Any],
    results: Results,
) -> tuple[CoreScore, bool]:
    """The score of a task, and whether it was measured now."""
    from nanochat_ray.evals import core

    if (entry := results.find("core", task.label, settings)) is not None:
        return core.CoreScore(task.label, entry["correct"], entry["total"], task.baseline), False
    examples = core.choose(core_data.load(task, path), count)
    progress = print_progress(task.label)
    score, _ = core.evaluate(engine, tokenizer, task, examples, progress=progress)
    counts = {"correct": score.correct, "total": score.total}
    shares = {"accuracy": score.accuracy, "centered": score.centered_accuracy}
    results.store("core", task.label, settings, {**counts, **shares})
    return score, True


def print_progress(label: str) -> Callable[[int, int], None]:
    """Prints the rate and the time that is left, every few seconds."""
    start = last = time.perf_counter()
    first_count: int | None = None

    def show(count: int, total: int) -> None:
        nonlocal last, first_count
        if first_count is None:
            first_count = count - 1  # a command that continues begins behind what was there
        now = time.perf_counter()
        if now - last >= PROGRESS_S:
            last = now
            rate = (count - first_count) / (now - start)
            seconds_left = (total - count) / rate
            text = f"{label}: {count}/{total}, {rate:.1f} a second, {seconds_left:.0f} s left"
            print(text, file=sys.stderr)

    return show
