"""Any number of engines measures what one does, also if one of them dies; no Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.config import EngineConfig, EnginePrecision
from nanochat_ray.engine.offline import LocalEngine, OfflineEngine
from nanochat_ray.engine.precision import checkpoint_dtype
from nanochat_ray.engine.request import EngineStoppedError
from nanochat_ray.evals import bpb, core, core_data, tasks
from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray import fleet, fleet_engine
from nanochat_ray.on_ray.fleet import Fleet
from nanochat_ray.on_ray.fleet_engine import EngineSpec, FleetEngine
from nanochat_ray.storage import Store
from tests.engine.engine_kit import needs_compiler
from tests.evals.test_core import write
from tests.rl.tiny_rl import EvenFirst, save_parent
from tests.tiny import TOKENIZER, save_model, tiny_config

CONFIG = EngineConfig(max_num_seqs=2, max_num_batched_tokens=64)


class Engine(FleetEngine):
    """Dies in its call number ``dies_at``."""

    def __init__(self, dies_at: int = 0):
        super().__init__(gpu=False, threads=1)
        self.dies_at, self.num_calls = dies_at, 0

    def run(self, *call: Any) -> list[Any]:
        self.num_calls += 1
        if self.num_calls == self.dies_at:
            raise EngineStoppedError("gone")
        return super().run(*call)

    def is_ready(self) -> bool:
        return False


@pytest.fixture
def run(root: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Of a random policy. The object store is this process."""
    monkeypatch.setattr(fleet.ray, "put", lambda arrays: arrays)
    monkeypatch.setattr(fleet_engine.ray, "get", lambda arrays: arrays)
    save_parent(root)
    return root.child("runs", "chat")


def engines_of(run: Store, config: EngineConfig) -> Iterator[OfflineEngine]:
    """One; three, the first of which dies in its first call."""
    model, tokenizer = checkpoint.load_model(run, dtype=checkpoint_dtype(config.precision))
    yield LocalEngine.from_model(model, tokenizer, config)
    spec = EngineSpec(owner="me", model=model.config, tokenizer_run=run.uri, config=config)
    many = Fleet([Engine(dies_at=1), Engine(), Engine()], spec)
    many.load(0, float32_model(run).state_dict())
    yield many
    assert many.num_lost_engines == 1


def float32_model(run: Store) -> GPT:
    return checkpoint.load_model(run)[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_answers_are_those_of_one_engine(run: Store, precision: EnginePrecision) -> None:
    config = dataclasses.replace(CONFIG, precision=precision)
    texts: list[dict[str, str]] = []
    scores = []
    for engine in engines_of(run, config):
        texts.append({})
        scores.append(
            tasks.evaluate(
                engine,
                TOKENIZER,
                EvenFirst("test", 20, 0),
                count=20,
                samples=3,
                temperature=1.0,
                max_tokens=6,
                on_answer=texts[-1].__setitem__,
            )
        )
    assert texts[0] == texts[1]
    assert len(texts[0]) == 60
    assert len(set(texts[0].values())) > 10
    assert scores[0] == scores[1]
    assert 0 < scores[0].accuracy < 1


def test_core_decides_as_one_engine(run: Store, tmp_path: Path) -> None:
    write(tmp_path, count=40)
    paths = core_data.find_files(str(tmp_path), tmp_path)
    task = next(task for task in core_data.TASKS if task.file in paths)
    examples = core.choose(core_data.load(task, paths[task.file]))
    results = [
        core.evaluate(engine, TOKENIZER, task, examples)
        for engine in engines_of(run, core.core_engine_config(float32_model(run).config, CONFIG))
    ]
    assert results[0] == results[1]


@needs_compiler  # a row of torch's matmul may depend on the others, with heads of 8 too
def test_bits_per_byte_are_equal_to_the_last_bit(run: Store) -> None:
    """However the spans of a text are divided."""
    model, generator = GPT(tiny_config(n_head=2, n_kv_head=1, sequence_len=48)), torch.Generator()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1, generator=generator.manual_seed(0))
    save_model(run, 1, model)
    documents = [chr(97 + i % 26) * (i * 7 % 90) for i in range(60)]
    config = bpb.scoring_config(float32_model(run).config, CONFIG)
    one, many = (bpb.evaluate_text(e, TOKENIZER, documents) for e in engines_of(run, config))
    assert one == many


def test_a_new_spec_gets_a_new_engine(run: Store) -> None:
    """Of another command, whose version 0 is not that of the first."""
    model, engine = float32_model(run), Engine()
    spec = EngineSpec(owner="a", model=model.config, tokenizer_run=run.uri, config=CONFIG)
    tasks_of_engine = []
    for owner in ("a", "b"):
        one = Fleet([engine], dataclasses.replace(spec, owner=owner))
        one.load(0, model.state_dict())
        texts: dict[str, str] = {}
        tasks.evaluate(
            one, TOKENIZER, EvenFirst("test", 3, 0), count=3, on_answer=texts.__setitem__
        )
        tasks_of_engine.append(texts)
        for weight in model.state_dict().values():
            weight.mul_(1.5)
    assert tasks_of_engine[0] != tasks_of_engine[1]
