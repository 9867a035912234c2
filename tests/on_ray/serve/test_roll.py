"""Two replicas follow their run while clients stream: no answer fails or mixes checkpoints."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray import serve

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.config import to_json
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.loading import engine_from_run
from nanochat_ray.on_ray.config import ServeConfig
from nanochat_ray.on_ray.serve.deployment import build
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.local import LocalClient
from nanochat_ray.storage import Store
from tests.on_ray.serve.tiny_run import engines, write_checkpoint
from tests.serve.serving import serving
from tests.tiny import TOKENIZER
from tests.waiting import wait_for

pytestmark = pytest.mark.ray

ENGINE = EngineConfig(max_num_seqs=8, max_num_batched_tokens=64, max_queue_size=64)
TOKENS = 200
PROMPT = [65, 66, 67]


@pytest.fixture
def run(tmp_path: Path) -> Store:
    root = Store.at(str(tmp_path))
    write_checkpoint(root, 0)
    TOKENIZER.save(root.child("tokenizers", TOKENIZER.fingerprint[:16]))
    return root


@pytest.fixture
def followed_url(url: str, run: Store) -> Iterator[str]:
    config = ServeConfig(
        storage=run.uri,
        run="tiny",
        num_replicas=2,
        cpus=0.5,
        follow="latest",
        engine=ENGINE,
    )
    serve.run(build(to_json(config)), name="follow", route_prefix="/follow")
    wait_for(lambda: len(engines(f"{url}/follow")) == 2, 180, "two engines")
    yield f"{url}/follow"
    serve.delete("follow")


def stream(url: str) -> tuple[str, str]:
    """Fingerprint and text of one answer."""
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    fingerprints, text = set(), ""
    with httpx.stream(
        "POST",
        f"{url}/v1/completions",
        json={**body, "stream": True},
        timeout=120,
    ) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk: dict[str, Any] = json.loads(line[6:])
                assert "error" not in chunk, chunk
                fingerprints.add(chunk["system_fingerprint"])
                text += chunk["choices"][0]["text"]
    (fingerprint,) = fingerprints
    return fingerprint, text


def reference(run: Store, name: str) -> str:
    """The text of an engine that has served no other checkpoint."""
    engine, tokenizer = engine_from_run(run, ENGINE, name)
    client = LocalClient(engine)
    with serving(build_app(client, tokenizer, "tiny", client.max_model_len)) as url:
        text = stream(url)[1]
    client.close()
    return text


def test_streams_outlive_three_rolls(followed_url: str, run: Store) -> None:
    end = threading.Event()
    answers: list[tuple[str, str]] = []

    def client() -> None:
        for _ in iter(end.is_set, True):
            answers.append(stream(followed_url))

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client) for _ in range(4)]
        try:
            wait_for(lambda: answers, 120, "an answer with the first checkpoint")
            for seed in (1, 2, 3):
                write_checkpoint(run, seed)
                name = f"step-{100 + seed:06d}"
                wait_for(
                    lambda name=name: (
                        [e["checkpoint"] for e in engines(followed_url)] == [name] * 2
                    ),
                    120,
                    name,
                )
        finally:
            end.set()
        for each in clients:
            each.result()
    answers.append(stream(followed_url))  # with the last one
    store = run.child("runs", "tiny")
    names = [f"step-{100 + seed:06d}" for seed in range(4)]
    texts = {checkpoint.weight_version(store, n): reference(store, n) for n in names}
    assert len(set(texts.values())) == 4
    assert all(text == texts[fingerprint] for fingerprint, text in answers)
    assert len({fingerprint for fingerprint, _ in answers}) > 1
