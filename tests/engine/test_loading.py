"""``engine_from_run``, and the examples in the engine's README."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import nanochat_ray
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.loading import engine_from_run
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from tests.engine.engine_kit import answer, uncached_greedy
from tests.tiny import TOKENIZER, save_model, tiny_config

README = Path(nanochat_ray.__file__).with_name("engine") / "README.md"


def write_run(run: Store, steps: int = 1) -> list[GPT]:
    models = []
    for step in range(steps):
        model = GPT(tiny_config())
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3, generator=generator)
        save_model(run, step, model)
        models.append(model.eval())
    return models


def test_latest_or_named_checkpoint(tmp_path: Path) -> None:
    run = Store.at(str(tmp_path))
    models = write_run(run, steps=2)
    for name, model in (("", models[1]), ("step-000000", models[0]), ("step-000001", models[1])):
        engine, tokenizer = engine_from_run(run, EngineConfig(max_num_seqs=2), name)
        assert tokenizer.fingerprint == TOKENIZER.fingerprint
        request = Request(
            id="r", prompt=[1, 2], params=SamplingParams(max_tokens=8, temperature=0.0)
        )
        assert answer(engine, request) == uncached_greedy(model, [1, 2], 8)
        grammar = {"choice": ["yes"]}
        params = SamplingParams(max_tokens=8, grammar=grammar)
        assert answer(engine, Request(id="g", prompt=[1], params=params)) == TOKENIZER.encode("yes")


def test_another_tokenizer_is_rejected(tmp_path: Path) -> None:
    run = Store.at(str(tmp_path))
    write_run(run)
    engine_from_run(run, EngineConfig(), tokenizer_fingerprint=TOKENIZER.fingerprint)
    with pytest.raises(ValueError, match=r"checkpoint='step-000000' has another tokenizer"):
        engine_from_run(run, EngineConfig(), tokenizer_fingerprint="0" * 64)


def test_readme_examples(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Store.at(str(tmp_path / "runs" / "base")))
    names: dict[str, Any] = {}
    for source in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL):
        exec(source.replace("/data/", f"{tmp_path}/"), names)
    lines = capsys.readouterr().out.splitlines()
    assert any(line.endswith(" length") for line in lines)
    assert [line.split()[0] for line in lines[-2:]] == ["first", "second"]


def test_readme_names_files_that_exist() -> None:
    names = set(re.findall(r"`((?:kvcache/)?\w+\.py)", README.read_text()))
    assert len(names) > 20
    assert [name for name in sorted(names) if not (README.parent / name).is_file()] == []
