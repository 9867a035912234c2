"""What Ray and the driver want of a worker, and which errors end a run. No Ray runs."""

from __future__ import annotations

import contextlib
import errno
from typing import Any

import pytest

from nanochat_ray.on_ray import train
from nanochat_ray.on_ray.train import NoRetry, PrometheusLogger, WorkerHooks


@pytest.mark.parametrize(
    ("error", "is_final"),
    [
        *((ValueError("x"), True), (FloatingPointError("nan"), True)),
        *((OSError(errno.ENOSPC, "full"), True), (OSError(errno.ECONNRESET, "reset"), False)),
        (RuntimeError("x"), False),
    ],
)
def test_errors_that_a_restart_repeats_are_final(
    error: Exception, is_final: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    errors = {1: error, 0: RuntimeError("a peer\nis gone")}
    with pytest.raises(type(error)) if is_final else contextlib.nullcontext():
        NoRetry().after_exception(None, errors)
    text = f"worker 1 failed: {type(error).__name__}: {error}"
    lines = [] if is_final else ["worker 0 failed: RuntimeError: a peer is gone", text]
    assert capsys.readouterr().out.splitlines() == lines


def test_a_preemption_saves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    infos: list[Any] = [None, "soon", "soon"]
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: infos.pop(0))
    hooks = WorkerHooks(lambda: False, None)
    assert [hooks.should_save() for _ in range(3)] == [False, True, False]


def test_steps_stay_out_of_the_validation_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, **_: Any):
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tags == {"run": "r"}
            values[self.name] = value

    monkeypatch.setattr(train, "Gauge", Gauge)
    logger = PrometheusLogger("r")
    logger.on_record({"kind": "train", "loss": 2.0, "bits_per_byte": 3.0})
    assert values == {"nanochat_train_loss": 2.0}
    logger.on_record({"kind": "eval", "bits_per_byte": 1.5})
    assert values["nanochat_train_bits_per_byte"] == 1.5
