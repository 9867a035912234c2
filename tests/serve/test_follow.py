"""An endpoint that follows its run while clients stream from it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checkpoint.follow import (
    CheckpointWatcher,
    NewCheckpoint,
    ServedCheckpoint,
    previous_checkpoint,
)
from nanochat_ray.cli import rollback
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.loading import engine_from_run
from nanochat_ray.serve import follow
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.follow import Follower
from nanochat_ray.serve.local import LocalClient
from nanochat_ray.storage import Store
from tests.checkpoint.test_follow import damage, save
from tests.serve.serving import get, post, serving
from tests.waiting import wait_for

CONFIG = EngineConfig(max_num_seqs=3)
BODY = {"prompt": "abc", "temperature": 0, "max_tokens": 24, "ignore_eos": True}


@pytest.fixture
def run(root: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(follow, "POLL_S", 0.02)
    store = root.child("runs", "r")
    save(store, 1, 2.0)
    return store


@pytest.fixture
def url(run: Store) -> Iterator[str]:
    engine, tokenizer = engine_from_run(run, CONFIG)
    client = LocalClient(engine)

    def roll(new: Any) -> None:
        client.swap_weights(new.weights, new.about.version, 30.0).result()

    current = ServedCheckpoint.of(run, "step-000001")
    follower = Follower(CheckpointWatcher(run, "r", "latest", current, margin=0.1), roll)
    client.follow_status = follower.status
    follower.start()
    with serving(build_app(client, tokenizer, "r", client.max_model_len)) as url:
        yield url
    follower.close()
    client.close()


def answer(run: Store, name: str) -> str:
    """Of an engine that has served no other checkpoint."""
    engine, tokenizer = engine_from_run(run, CONFIG, name)
    client = LocalClient(engine)
    with serving(build_app(client, tokenizer, "r", client.max_model_len)) as url:
        text: str = post(f"{url}/v1/completions", json=BODY).json()["choices"][0]["text"]
    client.close()
    return text


def stream(url: str, n: int) -> tuple[set[str], list[str]]:
    """The fingerprints and the texts of one answer."""
    fingerprints, texts = set(), [""] * n
    with httpx.stream(
        "POST", f"{url}/v1/completions", json={**BODY, "n": n, "stream": True}, timeout=60
    ) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                fingerprints.add(chunk["system_fingerprint"])
                for choice in chunk["choices"]:
                    texts[choice["index"]] += choice["text"]
    return fingerprints, texts


def checkpoint_of(url: str) -> str:
    name = get(f"{url}/v1/models").json()["data"][0]["checkpoint"][:11]
    status = get(f"{url}/health").json()["follow"]
    return str(name) if status["checkpoint"] == name else ""


@pytest.mark.slow
def test_no_answer_has_two_checkpoints(run: Store, url: str) -> None:
    end = threading.Event()

    def client(i: int) -> list[tuple[set[str], list[str]]]:
        answers = []
        while not end.is_set():
            answers.append(stream(url, n=1 + i % 2))
        return answers

    first = stream(url, n=1)
    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, i) for i in range(4)]
        try:
            for step in (2, 3, 4):
                save(run, step, 1.0)
                wait_for(lambda name=f"step-{step:06d}": checkpoint_of(url) == name, 60)
        finally:
            end.set()
        answers = [answer for each in clients for answer in each.result()]
    answers += [first, stream(url, n=1)]
    names = [f"step-{step:06d}" for step in (1, 2, 3, 4)]
    texts = {checkpoint.weight_version(run, name): answer(run, name) for name in names}
    assert len(set(texts.values())) == 4
    for fingerprints, choices in answers:
        (fingerprint,) = fingerprints
        assert set(choices) == {texts[fingerprint]}
    assert len({fingerprint for (fingerprint,), _ in answers}) > 1


def test_refusals_are_in_health_and_metrics(root: Store, run: Store, url: str) -> None:
    elsewhere = root.child("runs", "elsewhere")
    damage(elsewhere, "byte")
    # In one motion: before it was damaged it was sound, and would have been served.
    (Path(elsewhere.root) / "step-000002").rename(Path(run.root) / "step-000002")

    def refusals() -> dict[str, str]:
        reasons: dict[str, str] = get(f"{url}/health").json()["follow"]["refused"]
        return reasons

    wait_for(refusals)
    assert "weights.msgpack is damaged" in refusals()["step-000002"]
    assert 'nanochat_checkpoints_refused_total{model_name="r"} 1.0' in get(f"{url}/metrics").text
    assert checkpoint_of(url) == "step-000001"


def test_an_unexpected_error_does_not_end_the_following(
    run: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    errors: list[Exception] = [ZeroDivisionError(), OSError("the disk is gone")]
    roll_done = threading.Event()

    def roll(_: NewCheckpoint) -> None:
        if errors:
            raise errors.pop()
        roll_done.set()

    monkeypatch.setattr(follow, "RETRY_S", 0.01)
    current = ServedCheckpoint.of(run, "step-000001")
    follower = Follower(CheckpointWatcher(run, "r", "latest", current, margin=0.1), roll)
    save(run, 2, 1.5)
    follower.start()
    assert roll_done.wait(30)
    follower.close()
    assert follower.watcher.current.name == "step-000002"
    assert caplog.text.count("cannot be followed") == 1
    assert caplog.text.count("cannot be read: the disk is gone") == 1


def test_rollback_pins_until_it_is_resumed(root: Store, run: Store, url: str) -> None:
    def roll_back(**fields: Any) -> None:
        rollback.main(rollback.Args(storage=root.uri, run="r", wait_s=120, **fields))

    with pytest.raises(ValueError, match="has served no checkpoint before"):
        roll_back()
    save(run, 2, 1.0)
    wait_for(lambda: checkpoint_of(url) == "step-000002")
    wait_for(lambda: previous_checkpoint(run, "r") == "step-000001")  # named a moment later
    roll_back()
    assert checkpoint_of(url) == "step-000001"
    save(run, 3, 0.5)
    with pytest.raises(ValueError, match="pinned to step-000001 already"):
        roll_back()
    roll_back(to="step-000002")
    assert checkpoint_of(url) == "step-000002"
    roll_back(resume=True)
    wait_for(lambda: checkpoint_of(url) == "step-000003")


def test_rollback_needs_an_endpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no endpoint 'chat' follows run"):
        rollback.main(rollback.Args(storage=str(tmp_path)))
