"""Stored figures are reused only for what would be measured again alike."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nanochat_ray.cli import eval as job
from nanochat_ray.cli.eval_tasks import task_figures
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.offline import LocalEngine
from nanochat_ray.evals.core_data import MAX_SHOTS
from nanochat_ray.evals.results import Results, engine_settings
from nanochat_ray.storage import Store
from nanochat_ray.text.chat import Message
from tests.evals.test_bpb import model, save
from tests.evals.test_core import write
from tests.tiny import TOKENIZER


def engine(device: str = "cpu", length: int = 64, **config: Any) -> Any:
    return SimpleNamespace(
        config=EngineConfig(**config),
        device_type=device,
        max_model_len=length,
    )


@pytest.mark.parametrize(
    "other",
    [
        engine("cuda"),
        engine(length=65),
        engine(precision="bf16"),
        engine(kv_precision="fp8"),
        engine(batch_invariant=True),
    ],
)
def test_engines_that_round_differently_differ(other: Any) -> None:
    assert engine_settings(other) != engine_settings(engine())
    assert engine_settings(engine(max_num_seqs=3)) == engine_settings(engine())


class Letter:
    """Right is the letter that it shows."""

    name = "letter"

    def __init__(self, letter: str):
        self.letter, self.num_grades = letter, 0

    def __len__(self) -> int:
        return 2

    def question(self, index: int) -> list[Message]:
        return [{"role": "user", "content": str(index)}]

    def example(self, index: int) -> list[Message]:
        return [*self.question(index), {"role": "assistant", "content": self.letter}]

    def grade(self, index: int, answer: str) -> bool:
        self.num_grades += 1
        return answer == self.letter


def test_other_reference_answers_are_graded_anew(root: Store) -> None:
    args = job.Args(storage=root.uri, count=2, max_tokens=2, show_wrong=0)
    real = LocalEngine.from_model(model(), TOKENIZER, EngineConfig(max_num_seqs=2))
    results = Results(root, "step-000001", "w")
    first, same, other = Letter("a"), Letter("a"), Letter("b")
    for task in (first, same, other):
        task_figures(args, real, TOKENIZER, [task], results)
    assert [task.num_grades for task in (first, same, other)] == [2, 0, 2]


def test_one_engine_is_in_memory_at_a_time(
    root: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(root, "base", "base")
    write(tmp_path)
    engines: list[weakref.ref[Engine]] = []
    init = Engine.__init__

    def remember(new: Engine, *args: Any, **kwargs: Any) -> None:
        assert not any(other() for other in engines)
        engines.append(weakref.ref(new))
        init(new, *args, **kwargs)

    monkeypatch.setattr(Engine, "__init__", remember)
    monkeypatch.setattr(job, "make_task", lambda *_, **__: Letter("a"))
    (tmp_path / "x.txt").write_text("some text")
    options: Any = {"tasks": ("letter",), "text": (str(tmp_path / "x.txt"),), "show_wrong": 0}
    options |= {"core": str(tmp_path), "core_count": MAX_SHOTS + 1, "max_tokens": 2}
    job.main(job.Args(storage=root.uri, run="base", threads=1, **options))
    assert len(engines) == 3
