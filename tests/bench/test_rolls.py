"""What ``bench rolls`` publishes and counts."""

from __future__ import annotations

import json

import pytest

from nanochat_ray.bench import load, rolls
from nanochat_ray.bench.checkpoint_writer import REASONS, CheckpointWriter
from nanochat_ray.bench.http_stream import Result
from nanochat_ray.bench.rolls_report import Answer, BadCheckpoint, Report, Roll, failures, table
from nanochat_ray.checkpoint import checkpoint, follow
from nanochat_ray.checkpoint.follow import CheckpointWatcher, ServedCheckpoint
from nanochat_ray.storage import Store
from tests.checkpoint.test_follow import SERVED, Clock, save


@pytest.fixture
def run(root: Store) -> Store:
    store = root.child("runs", "r")
    save(store, 1, 2.0)
    return store


def watch(run: Store, clock: Clock) -> CheckpointWatcher:
    current = ServedCheckpoint.of(run, SERVED)
    return CheckpointWatcher(run, "chat", "latest", current, margin=0.1, clock=clock)


def test_every_bad_checkpoint_is_refused(run: Store) -> None:
    clock = Clock()
    watcher, writer = watch(run, clock), CheckpointWriter(run)
    names = {kind: writer.publish_bad(kind) for kind in REASONS}
    watcher.poll()
    clock.now = follow.INCOMPLETE_S + 1
    assert watcher.poll() is None
    for kind, name in names.items():
        assert REASONS[kind] in watcher.refusals[name].reason
        writer.delete(name)
    assert checkpoint.names(run) == [SERVED]


def test_sound_ones_take_turns_between_weights(run: Store) -> None:
    clock = Clock()
    watcher, writer = watch(run, clock), CheckpointWriter(run)
    names = []
    for _ in range(3):
        names.append(writer.publish())
        new = watcher.poll()
        assert new is not None
        watcher.accept(new)
    digests = [checkpoint.weights_digest(run, name) for name in names]
    assert digests[0] == digests[2] != digests[1] == checkpoint.weights_digest(run, SERVED)


def test_a_deployment_gets_the_checkpoint_alone() -> None:
    engine = {"name": "engine", "num_replicas": 2, "user_config": {"a": 1, "checkpoint": "x"}}
    app = {"name": "n", "args": {"run": "r"}, "deployments": [{"name": "ingress"}, engine]}
    after = {**engine, "user_config": {"a": 1, "checkpoint": "y"}}
    assert rolls._with_checkpoint(app, "y") == {**app, "deployments": [{"name": "ingress"}, after]}
    (only,) = rolls._with_checkpoint({"name": "n"}, "y")["deployments"]
    assert only == {"name": "engine", "user_config": {"checkpoint": "y"}}


def test_one_application_is_deployed(monkeypatch: pytest.MonkeyPatch) -> None:
    app, other = ({"name": name, "deployments": []} for name in ("nanochat", "other"))
    applications = {each["name"]: {"deployed_app_config": each} for each in (other, app)}
    status = {"proxy_location": "HeadOnly", "applications": {**applications, "run": {}}}
    bodies: list[bytes] = []

    def dashboard(url: str, body: bytes | None = None) -> str:
        bodies.extend([body] if body else [])
        return json.dumps(status)

    monkeypatch.setattr(rolls, "_dashboard", dashboard)
    monkeypatch.setattr(load, "model_at", lambda *_: "chat")
    rolls.Endpoint(rolls.Args(dashboard="http://x")).deploy("step-000002")
    engine = {"name": "engine", "user_config": {"checkpoint": "step-000002"}}
    after = [other, {"name": "nanochat", "deployments": [engine]}]
    assert [json.loads(body) for body in bodies] == [
        {"proxy_location": "HeadOnly", "applications": after}
    ]
    with pytest.raises(ValueError, match=r"application='run' is not allowed: .*: other, nanochat"):
        rolls.Endpoint(rolls.Args(dashboard="http://x", application="run")).deploy("step-000003")


def test_served_means_by_every_engine() -> None:
    engines = [{"weight_version": "step-000002-ab"}, {"weight_version": "step-000001-cd"}]
    assert not rolls.serves("step-000002")({"engines": engines})
    assert rolls.serves("step-000002")({"engines": engines[:1]})
    assert not rolls.serves("step-000002")({})


def answer(began: float, first: float, text: str, *fingerprints: str, error: str = "") -> Answer:
    result = Result(began, first_s=first, text=text, error=error)
    result.fingerprints = list(fingerprints)
    return Answer(0, result)


def test_counts_by_hand() -> None:
    report = Report(texts={"aa": ["one"], "bb": ["two"]})
    report.rolls = [Roll("step-000002", 10.0, 12.0, True), Roll("step-000003", 20.0, 24.0, False)]
    report.answers = [
        answer(5.0, 0.1, "one", "step-000001-aa"),
        answer(9.0, 0.3, "two", "step-000001-aa"),  # the text of the other one
        answer(10.0, 0.4, "two", "step-000002-bb"),
        answer(12.0, 0.4, "onetwo", "step-000001-aa", "step-000002-bb"),
        answer(13.0, 0.0, "", error="status 503"),
        answer(13.0, 0.2, "one"),  # of no checkpoint
    ]
    figures = report.figures()
    names = ("answers", "failed", "two_checkpoints", "changed")
    assert [figures[name] for name in names] == [6, 1, 1, 2]
    assert figures["first_token_beside_rolls_p50_s"] == pytest.approx(0.2)
    assert figures["first_token_in_rolls_p50_s"] == 0.4
    cells = "| 2 | 6 | 1 | 1 | 2 | 3.00 / 4.00 | 0.200, 0.400, 2.00 | 0.298, 0.400, 1.34 |"
    assert table(report).splitlines()[2] == cells
    assert failures(report) == [
        "1 answers failed: status 503",
        "1 answers name two checkpoints",
        "2 answers name no checkpoint, or have another text than it gives",
        "step-000003 was not served in time",
    ]


def test_a_refusal_must_name_the_fault() -> None:
    report = Report()
    report.bad = [
        BadCheckpoint("nan", "step-000001", "a tensor is not finite", True),
        BadCheckpoint("nan", "step-000002", "weights.msgpack is damaged", True),
        BadCheckpoint("worse", "step-000003", "", False),
    ]
    lines = table(report).splitlines()
    assert lines[-2:] == ["| nan | 2 | 1 | 2 |", "| worse | 1 | 0 | 0 |"]
    assert failures(report) == [
        "step-000002 (nan) was not refused: weights.msgpack is damaged",
        "step-000003 (worse) was not refused: no reason",
        "step-000003 (worse): the checkpoint before it was not served",
    ]


def test_bad_flags_are_refused() -> None:
    for bad in ({"rolls": -1}, {"tokens": 1}, {"wait_s": 0.0}, {"dashboard": "x", "bad": 1}):
        with pytest.raises(ValueError, match=r"is not allowed"):
            rolls.Args(**bad)
