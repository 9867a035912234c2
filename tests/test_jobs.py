"""The jobs as a person runs them: what is wrong gives one line and status 2; README's commands."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanochat_ray import cli
from nanochat_ray.cli.flags import all_flags
from nanochat_ray.storage import Store
from tests.processes import run_job
from tests.tiny import TOKENIZER, tiny_config, write_dataset

REPO = Path(__file__).parents[1]


def run(job: str, *flags: str) -> str:
    result = run_job(job, *flags)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def refusal(job: str, *flags: str) -> str:
    """The one line that a job says when it refuses; in this process, which has torch already."""
    stderr, argv = io.StringIO(), [str(REPO / "jobs" / f"{job}.py"), *flags]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(argv[0], run_name="__main__")
    assert exit_.value.code == 2
    lines = stderr.getvalue().strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.slow
def test_a_refusal_is_one_line_and_status_2(root: Store) -> None:
    command = [sys.executable, str(REPO / "jobs" / "train.py"), "--storage", root.uri]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == refusal("train", "--storage", root.uri) + "\n"


@pytest.mark.slow
def test_training_without_ray_and_out_to_hugging_face_and_back(root: Store, tmp_path: Path) -> None:
    write_dataset(root, "base")
    train = ("--no-ray", "--storage", root.uri, "--depth", "1", "--tokens", "640")
    train += ("--batch-tokens", "128", "--precision", "fp32", "--preset", "classic")
    train += ("--sample-tokens", "4")
    output = run("train", *train)
    assert '"done": true' in output.splitlines()[-1]
    assert root.child("runs", "base").exists("report.html")
    assert '"done": true' in run("train", *train).splitlines()[-1]
    folder = tmp_path / "hf"
    run("export", "--storage", root.uri, "--run", "base", "--out", str(folder))
    run("export", "--storage", root.uri, "--run", "back", "--import-from", str(folder))
    assert "exists already" in refusal(
        "export", "--storage", root.uri, "--run", "back", "--import-from", str(folder)
    )
    from nanochat_ray.checkpoint import checkpoint

    one, two = (checkpoint.load_model(root.child("runs", r))[0] for r in ("base", "back"))
    for (_, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert a.equal(b)
    # Continued pre-training starts from what was taken in: at no learning rate it ends there too.
    flags = ("--no-ray", "--storage", root.uri, "--tokens", "128", "--batch-tokens", "128")
    more = ("--run", "more", "--parent", "back", "--lr-scale", "1e-30", "--precision", "fp32")
    assert '"done": true' in run("train", *flags, *more).splitlines()[-1]
    three = checkpoint.load_model(root.child("runs", "more"))[0]
    for (_, a), (_, b) in zip(one.named_parameters(), three.named_parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)
    from nanochat_ray.checkpoint.find_tokenizer import find_tokenizer

    assert find_tokenizer(root, "back")[0].fingerprint == TOKENIZER.fingerprint


@pytest.mark.slow
def test_torchrun_gives_what_one_process_gives(root: Store, tmp_path: Path) -> None:
    write_dataset(root, "base")
    flags = ("--storage", root.uri, "--depth", "1", "--tokens", "640", "--batch-tokens", "128")
    flags += ("--precision", "fp32", "--lr-scale", "0.1", "--micro-batch-size", "2")
    flags += ("--sample-tokens", "4")
    run("train", "--no-ray", "--run", "one", *flags)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--",
    ]
    result = subprocess.run(
        [*torchrun, str(REPO / "jobs" / "train.py"), "--run", "two", *flags],
        capture_output=True,
        timeout=120,
        # It leaves a folder for logs in TMPDIR.
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr.decode()
    one, two = (
        [json.loads(line) for line in root.child("runs", r).read_text("metrics.jsonl").splitlines()]
        for r in ("one", "two")
    )
    for kind, key in (("train", "loss"), ("eval", "bits_per_byte")):
        a, b = ([r[key] for r in records if r["kind"] == kind] for records in (one, two))
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.slow
def test_the_same_jobs_on_s3(s3: str, tmp_path: Path) -> None:
    root = Store.at(s3).child("jobs")
    for stage in ("base", "sft"):
        write_dataset(root, stage, stage, length=64)
    at = ("--storage", root.uri, "--batch-tokens", "256", "--precision", "fp32", "--no-ray")
    at += ("--sample-tokens", "4")
    run("train", *at, "--depth", "1", "--tokens", "1280")
    run("train", *at, "--stage", "sft", "--dataset", "sft")
    assert root.child("runs", "chat").exists("latest")
    flags = ("--tasks", "identity", "--count", "3", "--show-wrong", "0")
    assert '"identity": 0.0' in run("eval", "--storage", root.uri, *flags)


def test_what_cannot_be_trained_is_refused(root: Store) -> None:
    at = ("--no-ray", "--storage", root.uri)
    assert "dataset='base' is not in" in refusal("train", *at)
    write_dataset(root, "base")
    assert "preset='newest' is not allowed" in refusal("train", *at, "--preset", "newest")
    assert "storage='ftp://x' is not allowed" in refusal("train", "--storage", "ftp://x")
    assert "parent='base' has no checkpoint" in refusal(
        "train", *at, "--stage", "sft", "--dataset", "base"
    )
    assert "depth=0" in refusal("train", *at, "--depth", "0")
    path = Path(root.root) / "datasets" / "base" / "train-0.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    flags = ("--depth", "1", "--tokens", "640", "--batch-tokens", "128", "--precision", "fp32")
    assert "shard train-0.arrow" in refusal("train", *at, *flags)


def test_what_cannot_be_measured_or_exported_is_refused(root: Store) -> None:
    assert "has no checkpoint" in refusal("eval", "--storage", root.uri)
    assert "task='nothing' is not known" in refusal(
        "eval", "--storage", root.uri, "--tasks", "nothing"
    )
    assert "either --out" in refusal("export", "--storage", root.uri)
    assert "has no checkpoint" in refusal("export", "--storage", root.uri, "--out", "x")


def _write_run(root: Store) -> Path:
    from nanochat_ray.checkpoint import checkpoint
    from nanochat_ray.model.gpt import GPT

    model = GPT(tiny_config())
    checkpoint.save(
        root.child("runs", "chat"),
        1,
        model_config=model.config,
        weights=dict(model.named_parameters()),
        optimizer=None,
        trainer={"step": 1, "metrics": {}, "about": {"parent": ""}},
        tokenizer=TOKENIZER,
    )
    return Path(root.root) / "runs" / "chat" / "step-000001"


def test_a_checkpoint_that_misses_a_file_is_refused(root: Store) -> None:
    folder = _write_run(root)
    (folder / "weights.msgpack").unlink()
    assert "weights.msgpack is missing" in refusal(
        "eval", "--storage", root.uri, "--tasks", "identity"
    )
    (folder / "manifest.json").unlink()
    assert "has no checkpoint" in refusal("eval", "--storage", root.uri, "--tasks", "identity")


def commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def command_args(command: list[str]) -> type:
    """The flags of `nanochat-ray [bench] NAME`, `python jobs/NAME.py`, `bash cluster/NAME.sh`."""
    if command[0] in ("python", "bash"):
        assert (REPO / command[1]).exists()
        module = cli.module_of(Path(command[1]).stem)
    elif command[1] == "bench":
        module = f"nanochat_ray.bench.{command[2].replace('-', '_')}"
    else:
        module = cli.module_of(command[1])
    return importlib.import_module(module).Args


def flag_names(args: type) -> set[str]:
    names = {flag.name for flag in all_flags(args)}
    switches = {flag.name.rpartition(".") for flag in all_flags(args) if flag.kind is bool}
    return names | {
        f"{prefix}.no-{name}" if dot else name.replace("--", "--no-")
        for prefix, dot, name in switches
    }


@pytest.mark.parametrize("command", commands(), ids=" ".join)
def test_readme_commands_exist(command: list[str]) -> None:
    """Scripts are there and take the flags that README gives them."""
    flags_in_use = {word for word in command if word.startswith("--")}
    if command != ["bash", "cluster/check.sh"]:
        assert flags_in_use <= flag_names(command_args(command))


def test_a_plan_needs_no_dataset_and_ends_in_one_object(root: Store) -> None:
    flags = ("--storage", root.uri, "--plan-only", "--depth", "20", "--workers", "8")
    plan = json.loads(run("train", *flags, "--hardware", "h100").splitlines()[-1])
    assert plan["fits"]
    assert plan["hardware"]["name"] == "h100"
    assert 1 < plan["hours"] < 2
    small = run("train", *flags, "--hardware", "l4", "--micro-batch-size", "32").splitlines()
    assert "does not fit: micro_batch_size=32 needs about" in small[-2]
    assert not json.loads(small[-1])["fits"]
    assert "hardware='h999' is not allowed: one of" in refusal(
        "train", *flags, "--hardware", "h999"
    )


@pytest.mark.slow
def test_resume_and_workers_are_checked_before_anything_starts(root: Store) -> None:
    write_dataset(root, "base")
    flags = ("--no-ray", "--storage", root.uri, "--depth", "1", "--tokens", "640")
    flags += ("--batch-tokens", "128", "--precision", "fp32", "--sample-tokens", "4")
    assert "resume='must'" in refusal("train", *flags, "--resume", "must")
    run("train", *flags, "--resume", "never")
    assert "resume='never'" in refusal("train", *flags, "--resume", "never")
    assert "wandb='p' needs the package" in refusal("train", *flags, "--wandb", "p")
    assert "spike_clip=0.5 is not allowed" in refusal("train", *flags, "--spike-clip", "0.5")
