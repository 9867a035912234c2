"""Every answer names the checkpoint that generated it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.loading import engine_from_run
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.local import LocalClient
from nanochat_ray.storage import Store
from tests.engine.test_loading import write_run
from tests.serve.serving import get, post, serving

ENDPOINTS = {
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]},
}


@pytest.fixture(scope="module")
def version_and_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folder: Path = tmp_path_factory.mktemp("run")
    run = Store.at(str(folder))
    write_run(run)
    manifest = json.loads((folder / "step-000000" / "manifest.json").read_text())
    digest = manifest["files"]["weights.msgpack"]["sha256"]
    engine, tokenizer = engine_from_run(run, EngineConfig(max_num_seqs=2))
    client = LocalClient(engine)
    with serving(build_app(client, tokenizer, "tiny", client.max_model_len)) as url:
        yield f"step-000000-{digest[:8]}", url
    client.close()


@pytest.mark.parametrize("path", ENDPOINTS)
def test_answers_name_their_checkpoint(version_and_url: tuple[str, str], path: str) -> None:
    version, url = version_and_url
    response = post(url + path, json={**ENDPOINTS[path], "max_tokens": 3})
    assert response.json()["system_fingerprint"] == version
    assert response.headers["x-checkpoint"] == version


@pytest.mark.parametrize("path", ENDPOINTS)
def test_chunks_name_their_checkpoint(version_and_url: tuple[str, str], path: str) -> None:
    version, url = version_and_url
    body = {**ENDPOINTS[path], "max_tokens": 3, "n": 2, "stream": True}
    response = post(url + path, json=body)
    chunks = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert chunks.pop() == "[DONE]"
    assert {json.loads(chunk)["system_fingerprint"] for chunk in chunks} == {version}
    assert response.headers["x-checkpoint"] == version


def test_models_health_and_metrics_name_it(version_and_url: tuple[str, str]) -> None:
    version, url = version_and_url
    assert get(f"{url}/v1/models").json()["data"][0]["checkpoint"] == version
    assert get(f"{url}/health").json()["engines"][0]["weight_version"] == version
    line = f'nanochat_num_engines_by_checkpoint{{checkpoint="{version}",model_name="tiny"}} 1.0'
    assert line in get(f"{url}/metrics").text


def test_other_weights_have_another_version(tmp_path: Path) -> None:
    one, other = Store.at(str(tmp_path / "a")), Store.at(str(tmp_path / "b"))
    write_run(one)
    write_run(other)
    name = "step-000000"
    assert checkpoint.weight_version(one, name) == checkpoint.weight_version(other, name)
    model, _ = checkpoint.load_model(other, name)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    weights["transformer.wte.weight"][0, 0] += 1
    checkpoint.save(
        other,
        0,
        model_config=model.config,
        weights=weights,
        optimizer=None,
        trainer={"step": 0},
        tokenizer=checkpoint.load(one, name, optimizer=False).tokenizer,
    )
    assert checkpoint.weight_version(one, name) != checkpoint.weight_version(other, name)
