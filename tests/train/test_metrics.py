"""What a run reports of itself, from numbers made up by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from nanochat_ray.train import metrics as metrics_module
from nanochat_ray.train.loggers import progress_line
from nanochat_ray.train.metrics import Metrics, duration, to_jsonl, val_metric
from nanochat_ray.train.step import RankVotes, StepResult


def result(loss: float = 2.0, grad_norm: float = 1.0, **fields: Any) -> StepResult:
    values = {
        "tokens": 200,
        "trained_tokens": 30,
        "lr_factor": 0.5,
        "weights_updated": True,
        "votes": RankVotes(),
    } | fields
    return StepResult(loss=loss, grad_norm=grad_norm, **values)


def metrics(**fields: float) -> Metrics:
    new = Metrics(**fields)
    new.start_clock(10)
    return new


def test_figures_of_a_step() -> None:
    m = metrics(flops_per_token=1e6, peak_flops=1e9, bytes_per_token=4.0)
    record = m.step(1, result(math.log(2) * 8), seconds=0.5, data_wait=0.1)
    # 200 tokens in half a second, 1e6 FLOPs each, of 1e9: 0.4. 8 bits a token of 4 bytes: 2.
    assert record["tokens_per_s"] == 400
    assert record["mfu"] == pytest.approx(0.4)
    assert record["bits_per_byte"] == pytest.approx(2.0)
    assert record["eta_s"] == pytest.approx(9 * 0.5)
    m.step(2, result(), seconds=0.2, data_wait=0)
    record = m.step(3, result(), seconds=0.4, data_wait=0)
    assert record["eta_s"] == pytest.approx(7 * 1.1 / 3)
    assert (record["kind"], record["step"], record["steps"]) == ("train", 3, 10)
    assert (record["trained_tokens"], record["lr_factor"], record["skipped"]) == (30, 0.5, False)


def test_unknown_metrics_are_omitted() -> None:
    record = metrics().step(1, result(weights_updated=False), seconds=1, data_wait=0)
    assert not {"mfu", "bits_per_byte"} & set(record)
    assert record["skipped"]
    assert metrics(peak_flops=9.0).step(1, result(), seconds=1, data_wait=0)["mfu"] == 0


def test_norms_are_the_last_100_finite_ones() -> None:
    m = metrics()
    for step in range(150):
        norm = math.nan if step == 120 else float(step)
        m.step(step + 1, result(grad_norm=norm), seconds=1, data_wait=0)
    assert m.grad_norms(3) == [149, 148, 147]
    assert len(m.grad_norms(1000)) == 100
    assert m.grad_norms(1000)[-1] == 49
    # An empty batch has a gradient of 0, which moved nothing.
    m.step(151, result(grad_norm=0.0, weights_updated=False), seconds=1, data_wait=0)
    assert m.grad_norms(1) == [149]
    again = metrics()
    again.resume("", {"grad_norms": m.state()["grad_norms"]}, before=0)
    assert again.grad_norms(1000) == m.grad_norms(1000)


def test_the_summary_by_hand() -> None:
    m = metrics(flops_per_token=2.0, peak_flops=400.0)
    for step in range(1, 31):
        m.step(step, result(float(step), tokens=10), seconds=0.5, data_wait=0.125)
    for bits in (3.0, 1.5, 2.0):
        m.add(kind="eval", step=30, seconds=1.0, bits_per_byte=bits)
    for stall in (0.25, 0.75, 0.5):
        m.add(kind="save", step=30, stall=stall)
    summary = m.summary()
    assert summary == {
        "tokens": 300,
        "loss": 20.5,  # the mean of 11 to 30
        "tokens_per_s": 20.0,
        "data_wait_share": 0.25,
        "train_seconds": 15.0,
        "mfu": 0.1,
        "first_bits_per_byte": 3.0,
        "bits_per_byte": 2.0,
        "best_bits_per_byte": 1.5,
        "saves": 3,
        "longest_save_stall_s": 0.75,
    }
    assert metrics().summary() == {"tokens": 0}


def test_warmup_steps_have_no_rate() -> None:
    # The first step compiles for 100 s; the others train 10 tokens in half a second.
    m = metrics(flops_per_token=2.0, peak_flops=400.0)
    first = m.step(1, result(tokens=10), seconds=100.0, data_wait=0, is_warmup=True)
    for step in (2, 3):
        record = m.step(step, result(tokens=10), seconds=0.5, data_wait=0)
    assert "mfu" not in first
    assert first["eta_s"] == 9 * 100.0  # nothing better is known
    assert "MFU" not in progress_line(first)
    assert record["eta_s"] == pytest.approx(7 * 0.5)
    summary = m.summary()
    assert (summary["tokens_per_s"], summary["mfu"]) == (20.0, 0.1)
    assert (summary["tokens"], summary["train_seconds"]) == (30, 101.0)


def test_a_run_of_warmup_steps_has_their_rate() -> None:
    m = metrics(flops_per_token=2.0, peak_flops=400.0)
    m.step(1, result(tokens=10), seconds=4.0, data_wait=1.0, is_warmup=True)
    summary = m.summary()
    assert (summary["tokens_per_s"], summary["mfu"]) == (2.5, 0.0125)
    assert (summary["data_wait_share"], summary["loss"]) == (0.25, 2.0)


def test_figures_of_validations() -> None:
    m = metrics()
    m.add(kind="eval", step=0, seconds=1.0, val_loss=3.0, count=7)
    m.add(kind="eval", step=3, seconds=1.0, val_loss=5.0, count=7)
    m.add(kind="eval", step=5, seconds=2.0, val_loss=4.0, extra=0.5, count=7)
    summary = m.summary()
    assert math.isnan(summary.pop("first_extra"))
    assert summary == {
        "tokens": 0,
        "first_val_loss": 3.0,
        "val_loss": 4.0,
        "best_val_loss": 3.0,
        "extra": 0.5,
    }


def test_the_clock_of_a_resumed_run_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module.time, "time", lambda: 1234.56789)
    m = metrics()
    m.step(1, result(), seconds=100.0, data_wait=0)
    m.start_clock(20)
    record = m.step(2, result(), seconds=0.5, data_wait=0)
    assert (record["eta_s"], record["steps"], record["time"]) == (9.0, 20, 1234.568)


def test_figures_of_a_batch_are_recorded() -> None:
    step = result(metrics={"kl": 0.5})
    record = metrics().step(1, step, seconds=1.0, data_wait=0.25, reward=0.75)
    assert (record["kl"], record["reward"], record["data_wait"]) == (0.5, 0.75, 0.25)
    assert "warmup" not in record


def test_the_best_validation_is_the_lowest() -> None:
    m = metrics()
    assert m.best() is None
    for step, bits in ((0, 8.0), (4, 2.0), (8, 3.0)):
        m.add(kind="eval", step=step, seconds=1.0, bits_per_byte=bits)
    assert m.best() == (4, 2.0)
    assert m.state()["best"] == [4, 2.0]
    again = metrics()
    again.resume(to_jsonl(m.records), {"best": [2, 1.0]}, before=8)
    assert again.best() == (2, 1.0)
    assert val_metric({"kind": "eval", "val_loss": 0.5}) == 0.5
    assert val_metric({"kind": "eval", "bits_per_byte": 0.7, "val_loss": 0.5}) == 0.7
    assert val_metric({"kind": "train", "loss": 0.5}) is None


def test_a_log_is_read_up_to_the_checkpoint() -> None:
    m = metrics()
    for step in range(1, 6):
        m.step(step, result(float(step), tokens=10), seconds=1, data_wait=0)
    text = to_jsonl(m.records)
    again = metrics()
    assert again.resume(text, {}, before=3) == []
    assert [r["step"] for r in again.records] == [1, 2, 3]
    assert again.grad_norms(9) == [1.0] * 3
    (note,) = metrics().resume(text.replace('"kind": "train"', '"kind": 7', 1), {}, before=5)
    assert "1 damaged lines and 4 of 5 steps" in note
    for damage, note in (("{", "1 damaged lines and 5 of 5"), ("", "0 damaged lines and 5 of 6")):
        assert note in metrics().resume(text + damage, {}, before=5 + (not damage))[0]
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3, 4, 5]


def test_an_unknown_peak_is_said() -> None:
    assert "MFU unknown" in progress_line(metrics().step(1, result(), seconds=1, data_wait=0))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (95, "1:35"), (3599.4, "59:59"), (3600, "1:00:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_progress_line() -> None:
    m = metrics(flops_per_token=1e6, peak_flops=1e9, bytes_per_token=4.0)
    record = m.step(1, result(math.log(2) * 8), seconds=0.5, data_wait=0.1)
    assert progress_line(record) == (
        "step 1/10  loss 5.5452  bpb 2.0000  norm 1.00  lr ×0.50  400 tokens/s  MFU 40.0%  "
        "data wait 20.0%  left 0:04"
    )


@pytest.mark.parametrize(
    ("line", "whole"),
    [
        ({"kind": "save", "step": 3, "stall": 0.5}, True),
        ({"kind": "save", "step": 3, "stall": 1}, True),
        ({"kind": "save", "step": 3.0, "stall": 0.5}, False),
        ({"kind": "save", "step": True, "stall": 0.5}, False),
        ({"kind": "save", "step": 3, "stall": "0.5"}, False),
        ({"kind": "save", "step": 3, "stall": True}, False),
        ({"kind": "save", "step": 3}, False),
        ({"kind": "eval", "step": 3, "seconds": 1.0, "bits_per_byte": 2.0}, True),
        ({"kind": "eval", "step": 3, "seconds": 1.0, "bits_per_byte": "2"}, False),
        ({"kind": "eval", "step": 3, "seconds": 1.0, "val_loss": 2.0, "mfu": "x"}, False),
        ({"kind": "sample", "step": 3, "prompt": "a", "text": "b"}, True),
        ({"kind": "sample", "step": 3, "prompt": "a"}, False),
        ({"kind": "other", "step": 3}, False),
        ([3], False),
    ],
)
def test_only_whole_records_are_read(line: object, whole: bool) -> None:
    m = metrics()
    m.resume(json.dumps(line) + "\n", {}, before=9)
    assert m.records == ([line] if whole else [])


@pytest.mark.parametrize("best", [[1, "x"], ["x", 1.0], [1], [1, 2.0, 3], "12", None, [1, True]])
def test_a_best_that_is_damaged_is_ignored(best: object) -> None:
    m = metrics()
    m.resume("", {"best": best, "grad_norms": [1.0, "x", 2.0, True]}, before=0)
    assert m.best() is None
    assert m.grad_norms(9) == [2.0, 1.0]
