"""Bits per byte of any text, against the definition and through ``nanochat-ray eval``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.cli import eval as job
from nanochat_ray.engine.config import EngineConfig, EnginePrecision
from nanochat_ray.engine.offline import LocalEngine
from nanochat_ray.evals import results
from nanochat_ray.evals.bpb import evaluate_text, scoring_config
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from tests.tiny import TOKENIZER, tiny_config


def model() -> GPT:
    gpt = GPT(tiny_config(sequence_len=16))
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(1))
    return gpt.eval().requires_grad_(False)


def engine_of(gpt: GPT, precision: EnginePrecision = "fp32") -> LocalEngine:
    # 3 sequences at a time: some wait for others.
    config = scoring_config(gpt.config, EngineConfig(max_num_seqs=3, precision=precision))
    return LocalEngine.from_model(gpt, TOKENIZER, config)


def test_every_byte_counts_once() -> None:
    """Against the sum of log-probabilities, a document and a span of the context at a time."""
    texts, gpt = ["a" * 40 + "bc", "", "héllo"], model()
    score = evaluate_text(engine_of(gpt), TOKENIZER, texts)
    nats = 0.0
    for text in texts:
        ids = [TOKENIZER.bos, *TOKENIZER.encode(text)]
        for start in range(0, len(ids) - 1, 16):
            span = torch.tensor([ids[start : start + 17]])
            if span.shape[1] > 1:
                nats += gpt.loss(span[:, :-1], span[:, 1:], reduction="sum").item()
    size = sum(len(text.encode()) for text in texts)
    assert score.bytes == size
    assert score.documents == 3
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert evaluate_text(engine_of(gpt), TOKENIZER, ["a" * 1000], max_tokens=50).tokens == 64
    with pytest.raises(ValueError, match="text is empty"):
        evaluate_text(engine_of(gpt), TOKENIZER, ["", ""])


def test_precision_changes_bits_per_byte_slightly() -> None:
    gpt = model()
    bits = {
        precision: evaluate_text(
            engine_of(gpt, precision), TOKENIZER, ["some text, " * 9]
        ).bits_per_byte
        for precision in ("fp32", "bf16", "int8")
    }
    # bfloat16 has 8 bits, int8 in blocks of 32 about 7: each sum is off by a share of a percent.
    assert 0 < abs(bits["bf16"] / bits["fp32"] - 1) < 0.05
    assert 0 < abs(bits["int8"] / bits["fp32"] - 1) < 0.05
    assert bits["bf16"] != bits["int8"]


def save(root: Store, run: str, stage: str, step: int = 1, **trainer: Any) -> None:
    gpt = model()
    checkpoint.save(
        root.child("runs", run),
        step,
        model_config=gpt.config,
        weights=dict(gpt.named_parameters()),
        optimizer=None,
        trainer={"step": step, "metrics": {}, "train_config": {"stage": stage}, **trainer},
        tokenizer=TOKENIZER,
    )


def evaluate_run(root: Store, capsys: pytest.CaptureFixture[str], **args: Any) -> dict[str, Any]:
    job.main(job.Args(storage=root.uri, threads=1, **args))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_base_model_is_measured_on_text(
    root: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"first_bits_per_byte": 8.0, "bits_per_byte": 3.0}
    save(root, "base", "base", metrics=figures)
    (tmp_path / "x.txt").write_text("some text")
    result = evaluate_run(root, capsys, run="base", text=(str(tmp_path / "x.txt"),))
    reference = evaluate_text(engine_of(model()), TOKENIZER, ["some text"])
    assert result["text_bits_per_byte"] == pytest.approx(reference.bits_per_byte, rel=1e-5)
    assert result["text_bytes"] == 9
    assert result["bits_per_byte"] == 3.0
    assert "accuracy" not in result  # it answers no chat
    assert evaluate_run(root, capsys, run="base")["bits_per_byte_before"] == 8.0


def test_eval_without_the_parent_run(root: Store, capsys: pytest.CaptureFixture[str]) -> None:
    save(root, "chat", "sft", about={"parent": "gone"})
    result = evaluate_run(root, capsys, tasks=("identity",), count=3, show_wrong=0)
    assert result["accuracy"] == {"identity": 0.0}
    assert result["questions"] == {"identity": 3}
    assert "bits_per_byte" not in result


def test_figures_are_those_of_the_base_model(root: Store, capsys: Any) -> None:
    figures = {"first_bits_per_byte": 8.0, "bits_per_byte": 3.0}
    save(root, "base", "base", metrics=figures)
    save(root, "chat", "sft", about={"parent": "base"})
    about = {"about": {"parent": "chat"}, "metrics": {"bits_per_byte": 1.0}}
    reference = {"bits_per_byte_before": 8.0, "bits_per_byte": 3.0}
    assert job.training_figures(job.Args(storage=root.uri, run="rl"), about) == reference
    # A run may have its own descendant's name for a parent, when it was trained anew.
    save(root, "chat", "sft", about={"parent": "chat"})
    assert job.training_figures(job.Args(storage=root.uri, run="rl"), about) == {}


class Short:
    """A task with fewer questions than are asked for, one of which does not fit."""

    name = "short"

    def __len__(self) -> int:
        return 4

    def question(self, index: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": "x" * (900 if index == 2 else 1)}]

    def example(self, index: int) -> list[dict[str, str]]:
        return [*self.question(index), {"role": "assistant", "content": "y"}]

    def grade(self, index: int, answer: str) -> bool:
        return False


def test_eval_says_what_it_asked(
    root: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(root, "chat", "sft")
    monkeypatch.setattr(job, "make_task", lambda *_, **__: Short())
    job.main(job.Args(storage=root.uri, threads=1, tasks=("short",), show_wrong=0))
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1])["questions"] == {"short": 4}
    assert "0/4 right" in output
    assert "no more than 4 questions; 1 do not fit" in output


def test_a_killed_evaluation_continues(
    root: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's layout of GSM8K; the command ends at its fourth answer, and then goes on."""
    rows = [
        {"question": f"{i} + 1?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(6)
    ]
    path = tmp_path / "main"
    path.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), path / "test-00000-of-00001.parquet")
    name = f"gsm8k,path={tmp_path}"
    options = {"tasks": (name,), "count": 6, "samples": 2, "max_tokens": 8, "show_wrong": 0}
    save(root, "undisturbed", "sft")
    reference = evaluate_run(root, capsys, run="undisturbed", **options)
    assert reference["questions"] == {name: 6}
    save(root, "chat", "sft")
    add = results.Answers.add

    def add_and_stop(answers: results.Answers, request_id: str, text: str) -> None:
        add(answers, request_id, text)
        if len(answers.texts) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(results, "SAVE_S", 0.0)
        patch.setattr(results.Answers, "add", add_and_stop)
        with pytest.raises(KeyboardInterrupt):
            job.main(job.Args(storage=root.uri, threads=1, **options))
    capsys.readouterr()
    job.main(job.Args(storage=root.uri, threads=1, **options))
    output = capsys.readouterr().out
    assert f"{name}: 4 answers are there already" in output
    assert json.loads(output.splitlines()[-1]) == {**reference, "run": "chat"}
    evals = root.child("runs", "chat", "evals")
    (file,) = (file for file in evals.list() if "answers" in file)
    twin = root.child("runs", "undisturbed", "evals")
    assert json.loads(evals.read_text(file)) == json.loads(twin.read_text(file))
    job.main(job.Args(storage=root.uri, threads=1, **options))
    assert "measured before" in capsys.readouterr().out
    assert f"<td>{name}</td>" in root.child("runs", "chat").read_text("report.html")


def test_every_checkpoint_is_measured(root: Store, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (2, 1):
        save(root, "chat", "sft", step=step)
    options: dict[str, Any] = {"tasks": ("identity",), "count": 2, "show_wrong": 0}
    result = evaluate_run(root, capsys, checkpoint="all", **options)
    assert list(result["checkpoints"]) == ["step-000001", "step-000002"]
    assert result["checkpoints"]["step-000002"]["questions"] == {"identity": 2}
    page = root.child("runs", "chat").read_text("report.html")
    assert page.count("<circle") == 2
    with pytest.raises(ValueError, match="has no checkpoint"):
        evaluate_run(root, capsys, run="none", checkpoint="all")
