"""Which checkpoint an endpoint serves next, and which it refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from nanochat_ray.checkpoint import checkpoint, follow, lease
from nanochat_ray.checkpoint.follow import CheckpointWatcher, ServedCheckpoint, Target
from nanochat_ray.checkpoint.lease import Lease, leased_checkpoints
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from tests.outage import Outage
from tests.tiny import TOKENIZER, save_model, tiny_config

SERVED = "step-000001"


def save(
    run: Store,
    step: int,
    metric: float | None = None,
    tokenizer: Tokenizer = TOKENIZER,
    **fields: int,
) -> str:
    model = GPT(tiny_config(**fields))
    model.init_weights(torch.Generator().manual_seed(step))
    return save_model(run, step, model, tokenizer=tokenizer, val_metric=metric)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(root: Store) -> Store:
    store = root.child("runs", "r")
    save(store, 1, 2.0)
    return store


def watch(
    run: Store, target: Target = "latest", margin: float = 0.1, clock: Clock | None = None
) -> CheckpointWatcher:
    current = ServedCheckpoint.of(run, SERVED)
    return CheckpointWatcher(run, "chat", target, current, margin=margin, clock=clock or Clock())


def test_a_better_checkpoint_is_served(run: Store) -> None:
    watcher = watch(run)
    assert watcher.poll() is None
    save(run, 2, 1.5)
    new = watcher.poll()
    assert new is not None
    assert new.about.version == checkpoint.weight_version(run, "step-000002")
    model, _ = checkpoint.load_model(run, "step-000002")
    assert new.weights is not None
    assert all(torch.equal(new.weights[name], t) for name, t in model.state_dict().items())
    watcher.accept(new)
    assert watcher.poll() is None
    assert watcher.status()["checkpoint"] == "step-000002"
    assert watcher.status()["previous"] == SERVED
    # A rollback needs the one before.
    assert leased_checkpoints(run) == {SERVED, "step-000002"}


def damage(run: Store, kind: str) -> None:
    """Writes step 2, which is damaged in one way."""
    if kind == "tokenizer":
        other = Tokenizer.bytes_only()
        text = json.loads(other.to_json())
        save(run, 2, 1.0, Tokenizer.from_json(json.dumps({**text, "pattern": r"\s+|\S+"})))
        return
    if kind == "architecture":
        save(run, 2, 1.0, n_layer=3)
        return
    save(run, 2, 2.11 if kind == "worse" else 1.0)
    folder = Path(run.root) / "step-000002"
    file = folder / "weights.msgpack"
    if kind == "byte":
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif kind == "missing":
        file.unlink()
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    elif kind == "nan":
        write_nan(run)


def write_nan(run: Store) -> None:
    """Step 2 with a NaN and a manifest that fits, as a program without our check would write."""
    model, tokenizer = checkpoint.load_model(run, "step-000002")
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    weights["transformer.wte.weight"][0, 0] = torch.nan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "not_finite", lambda tensors: None)
        checkpoint.save(
            run,
            2,
            model_config=model.config,
            weights=weights,
            optimizer=None,
            trainer={"step": 2},
            tokenizer=tokenizer,
            val_metric=1.0,
        )


REASONS = {
    "byte": "weights.msgpack is damaged",
    "missing": "weights.msgpack is missing",
    "truncated": "weights.msgpack is damaged",
    "nan": "transformer.wte.weight has values that are not finite",
    "worse": "validation metric 2.1100 is worse than 2.0000 of step-000001",
    "tokenizer": "it has another tokenizer",
    "architecture": "n_layer=3, and step-000001 has 2",
}
CASES = [
    *(("latest", kind) for kind in REASONS),
    *(("best", kind) for kind in REASONS if kind != "worse"),  # which is no candidate
]


@pytest.mark.parametrize(("target", "kind"), CASES)
def test_bad_checkpoints_are_refused(run: Store, target: Target, kind: str) -> None:
    watcher = watch(run, target)
    damage(run, kind)
    for _ in range(2):
        assert watcher.poll() is None
    assert REASONS[kind] in watcher.refusals["step-000002"].reason
    assert (watcher.num_refusals, watcher.current.name) == (1, SERVED)


def test_an_incomplete_one_is_refused_later(run: Store) -> None:
    """Not while it may still be written."""
    clock = Clock()
    watcher = watch(run, clock=clock)
    save(run, 2, 1.0)
    manifest = run.read_bytes("step-000002/manifest.json")
    run.delete("step-000002/manifest.json")
    assert watcher.poll() is None
    assert not watcher.refusals
    clock.now = follow.INCOMPLETE_S + 1
    assert watcher.poll() is None
    assert "manifest.json is missing" in watcher.refusals["step-000002"].reason
    run.write_bytes("step-000002/manifest.json", manifest)
    new = watcher.poll()
    assert new is not None
    watcher.accept(new)
    assert not watcher.refusals


def test_an_older_sound_one_is_served_instead(run: Store) -> None:
    watcher = watch(run)
    damage(run, "byte")
    (Path(run.root) / "step-000002").rename(Path(run.root) / "step-000003")
    save(run, 2, 1.9)
    new = watcher.poll()
    assert new is not None
    assert new.about.name == "step-000002"
    assert "step-000003" in watcher.refusals
    save(run, 4, 1.8)
    newest = watcher.poll()
    assert newest is not None
    watcher.accept(newest)
    watcher.poll()
    assert not watcher.status()["refused"]  # it is older than what is served
    assert watcher.num_refusals == 1


def test_a_mended_one_is_served(run: Store) -> None:
    clock = Clock()
    watcher = watch(run, clock=clock)
    damage(run, "missing")
    assert watcher.poll() is None
    save(run, 2, 1.0)  # the same bytes: its manifest does not change
    clock.now = follow.FIRST_RETRY_S + 1
    assert watcher.poll() is not None


def test_retries_of_a_refused_one_slow_down(run: Store) -> None:
    clock, delays = Clock(), []
    watcher = watch(run, clock=clock)
    damage(run, "missing")
    for _ in range(9):
        assert watcher.poll() is None
        refusal = watcher.refusals["step-000002"]
        assert refusal.retry_at == clock.now + refusal.delay
        delays.append(refusal.delay)
        clock.now = refusal.retry_at
    assert delays == [10, 20, 40, 80, 160, 320, 600, 600, 600]
    assert watcher.num_refusals == 1


def test_weights_that_engines_refuse_are_refused(run: Store) -> None:
    """The watcher does not read them then; retries slow down as for those that it reads."""
    clock = Clock()
    current = ServedCheckpoint.of(run, SERVED)
    watcher = CheckpointWatcher(
        run, "chat", "latest", current, margin=0.1, reads_weights=False, clock=clock
    )
    damage(run, "byte")
    for delay in (10, 20, 40):
        new = watcher.poll()
        assert new is not None
        assert new.weights is None
        watcher.refuse(new.about.name, "weights.msgpack is damaged")
        assert watcher.refusals[new.about.name].delay == delay
        assert watcher.poll() is None
        clock.now += delay
    assert watcher.num_refusals == 1


def test_best_ignores_later_and_worse(run: Store) -> None:
    watcher = watch(run, "best")
    save(run, 5, 2.0)  # as good as the served one
    assert watcher.poll() is None
    save(run, 2, 1.5)
    save(run, 3, 1.9)
    new = watcher.poll()
    assert new is not None
    assert new.about.name == "step-000002"


def test_a_pin_holds_until_it_is_removed(run: Store) -> None:
    watcher = watch(run)
    save(run, 2, 1.5)
    new = watcher.poll()
    assert new is not None
    watcher.accept(new)
    follow.pin(run, "chat", follow.previous_checkpoint(run, "chat"))
    back = watcher.poll()
    assert back is not None
    assert back.about.name == SERVED  # though its metric is worse
    watcher.accept(back)
    save(run, 3, 1.0)
    assert watcher.poll() is None
    assert follow.first_checkpoint(run, "chat", "latest") == SERVED
    follow.unpin(run, "chat")
    new = watcher.poll()
    assert new is not None
    assert new.about.name == "step-000003"
    with pytest.raises(ValueError, match="step-000009"):
        follow.pin(run, "chat", "step-000009")


def test_other_weights_under_a_name_are_new(run: Store) -> None:
    """A run that resumes may write a checkpoint again."""
    watcher = watch(run)
    model = GPT(tiny_config())
    model.init_weights(torch.Generator().manual_seed(9))
    checkpoint.save(
        run,
        1,
        model_config=model.config,
        weights=model.state_dict(),
        optimizer=None,
        trainer={"step": 1},
        tokenizer=TOKENIZER,
        val_metric=2.0,
    )
    new = watcher.poll()
    assert new is not None
    assert new.about.version == checkpoint.weight_version(run, SERVED)


def test_leased_checkpoints_are_not_pruned(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = Lease(run, "replica#1/x")
    holder.hold([SERVED])
    for step in (2, 3, 4):
        save(run, step)
    checkpoint.prune(run, 1)
    assert checkpoint.names(run) == ["step-000004", SERVED]
    assert leased_checkpoints(run) == {SERVED}
    now = time.time()
    monkeypatch.setattr(lease.time, "time", lambda: now + lease.LEASE_S + 1)
    checkpoint.prune(run, 1)
    assert checkpoint.names(run) == ["step-000004"]
    assert not run.list(lease.FOLDER)


def test_endpoints_of_one_name_have_leases_of_their_own(run: Store) -> None:
    one, other = watch(run), watch(run)
    one.poll()
    save(run, 2, 1.5)
    new = other.poll()
    assert new is not None
    other.accept(new)
    other.close()
    assert leased_checkpoints(run) == {SERVED}  # which the first one serves
    one.close()


def test_a_released_lease_protects_nothing(run: Store) -> None:
    holder = Lease(run, "a")
    holder.hold([SERVED])
    holder.release()
    save(run, 2)
    checkpoint.prune(run, 1)
    assert checkpoint.names(run) == ["step-000002"]


def test_read_only_storage_can_be_followed(run: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Store, name: str, data: bytes) -> None:
        raise PermissionError(f"{name} is read-only")

    save(run, 2, 1.5)
    monkeypatch.setattr(Store, "write_bytes", refuse)
    watcher = watch(run)
    new = watcher.poll()
    assert new is not None
    watcher.accept(new)
    assert watcher.current.name == "step-000002"


@pytest.mark.parametrize("only", ["step-000002", "runs/r"])
def test_an_outage_refuses_nothing(run: Store, monkeypatch: pytest.MonkeyPatch, only: str) -> None:
    watcher = watch(run)
    save(run, 2)
    outage = Outage(monkeypatch)
    outage.only, outage.is_on = only, True
    with pytest.raises(OSError, match="cannot be reached"):
        watcher.poll()
    outage.is_on = False
    assert watcher.refusals == {}
    new = watcher.poll()
    assert new is not None
    assert new.about.name == "step-000002"
