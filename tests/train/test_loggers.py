"""The progress lines, from records made up by hand."""

from __future__ import annotations

import errno
import math
from pathlib import Path
from typing import Any

import pytest

from nanochat_ray.train.hooks import Hooks
from nanochat_ray.train.loggers import (
    ProgressPrinter,
    TensorBoardLogger,
    finite_metrics,
    progress_line,
    should_log,
)

STEP: dict[str, Any] = {
    "kind": "train",
    "step": 3,
    "steps": 10,
    "loss": 2.5,
    "grad_norm": 0.75,
    "lr_factor": 0.5,
    "tokens_per_s": 12_345.6,
    "mfu": 0.25,
    "seconds": 2.0,
    "data_wait": 0.5,
    "eta_s": 3_725.0,
    "skipped": False,
    "time": 1.0,
}
ROLLOUT: dict[str, Any] = {
    **STEP,
    "reward": 0.625,
    "groups": 24,
    "groups_with_signal": 9,
    "answer_tokens": 17.25,
    "truncated_share": 0.125,
    "entropy": 0.5,
    "logprob_diff": 6e-5,
    "rollout_tokens_per_s": 2_000.0,
}
LINE = "step 3/10  loss 2.5000  norm 0.75  lr ×0.50  12,346 tokens/s"
END = "data wait 25.0%  left 1:02:05"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, f"{LINE}  MFU 25.0%  {END}"),
        ({"mfu": None}, f"{LINE}  MFU unknown  {END}"),
        ({"mfu": None, "warmup": True}, f"{LINE}  {END}"),
        (
            {"save_delay": 9.0, "checkpoint_age": 61.0},
            f"{LINE}  MFU 25.0%  {END}  STORAGE FAILS: the last checkpoint is 1:01 old",
        ),
        (
            {"save_delay": 0.0, "save_pending": 30.5, "checkpoint_age": 61.0},
            f"{LINE}  MFU 25.0%  {END}  a checkpoint is being written for 0:30",
        ),
        ({"save_pending": 30.0}, f"{LINE}  MFU 25.0%  {END}"),
        ({"skipped": True}, f"{LINE}  MFU 25.0%  {END}  SKIPPED: nothing to train on"),
        (
            {"skipped": True, "grad_norm": math.nan},
            f"{LINE.replace('0.75', 'nan')}  MFU 25.0%  {END}  SKIPPED: not finite",
        ),
    ],
)
def test_a_line_of_training(changes: dict[str, Any], line: str) -> None:
    record = {k: v for k, v in {**STEP, **changes}.items() if v is not None}
    assert progress_line(record) == line


def test_a_line_of_rollouts() -> None:
    record = {k: v for k, v in ROLLOUT.items() if k != "mfu"}
    assert progress_line(record) == (
        "step 3/10  reward 0.625  signal 9/24  length 17.2  truncated 12.5%  entropy 0.500  "
        "|Δlogp| 6.0e-05  norm 0.75  lr ×0.50  2,000 rollout tokens/s  rollouts 25.0%  "
        "left 1:02:05"
    )


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            {"kind": "eval", "seconds": 1.25, "time": 3.0, "pass@1": 0.5, "pass@1/a": 0.25},
            "step 3  validation: pass@1 0.5000  (1.2 s)",
        ),
        ({"kind": "sample", "prompt": "a", "text": "b"}, "step 3  'a' → 'b'"),
        (
            {"kind": "sample", "prompt": "a", "text": "b", "reward": 0.5},
            "step 3  'a' → 'b'  (reward 0.5)",
        ),
        ({"kind": "save", "stall": 0.25}, "step 3  checkpoint; training stood still for 0.250 s"),
    ],
)
def test_lines_of_other_kinds(record: dict[str, Any], line: str) -> None:
    assert progress_line({"step": 3, **record}) == line
    assert should_log({"step": 3, **record}, 100)


def test_one_step_in_every_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    printer = ProgressPrinter(4)
    for step in range(1, 11):
        printer.on_record({**STEP, "step": step, "skipped": step == 6})
    steps = [line.split("/")[0] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["step 4", "step 6", "step 8", "step 10"]


def test_finite_numbers_are_metrics() -> None:
    record = {"kind": "eval", "step": 3, "steps": 9, "time": 1.0, "a": 2, "b": math.inf, "c": "x"}
    assert finite_metrics(record) == {"eval/a": 2.0}


def tensorboard_events(folder: Path) -> list[Any]:
    """Of the only file: each record is a length of 8 bytes and a CRC of 4, data, and a CRC."""
    events = pytest.importorskip("tensorboardX.proto.event_pb2")
    (file,) = folder.iterdir()
    data, values = file.read_bytes(), []
    while data:
        end = 12 + int.from_bytes(data[:8], "little")
        values.append(events.Event.FromString(data[12:end]))
        data = data[end + 4 :]
    return values


def test_tensorboard_gets_names_values_and_steps(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    logger = TensorBoardLogger(str(tmp_path / "board/run"))
    logger.on_record({"kind": "eval", "step": 3, "val_loss": 2.5})
    logger.on_record({"kind": "sample", "step": 4, "prompt": "a", "text": "b"})
    logger.close()
    version, scalar, text = tensorboard_events(tmp_path / "board/run")
    assert version.file_version == "brain.Event:2"
    assert (scalar.step, scalar.summary.value[0].tag) == (3, "eval/val_loss")
    assert scalar.summary.value[0].simple_value == 2.5
    assert (text.step, text.summary.value[0].tag) == (4, "a/text_summary")
    assert list(text.summary.value[0].tensor.string_val) == [b"b"]


@pytest.mark.parametrize("method", ["write_event", "flush", "close"])
def test_a_full_disk_ends_tensorboards_file_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    method: str,
) -> None:
    writer = pytest.importorskip("tensorboardX.event_file_writer")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    logger = TensorBoardLogger(str(tmp_path))
    file = logger._writer._py_recordio_writer
    monkeypatch.setattr(writer.EventsWriter, method, fail)
    for step in range(100):
        logger.on_record({"kind": "train", "step": step, "loss": 2.5})
    logger.close()
    file.close()  # what fails above leaves it open
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"tensorboard: {tmp_path}: [Errno {errno.ENOSPC}] No space left")


def test_hooks_want_nothing_by_default() -> None:
    hooks: Hooks = ProgressPrinter(1)
    assert (hooks.should_stop(), hooks.should_save()) == (False, False)
