"""``nanochat-ray export`` and ``stop``: what they are asked to write, read and end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nanochat_ray.checkpoint import checkpoint, hf, nanochat
from nanochat_ray.cli import export, stop
from nanochat_ray.model.gpt import GPT
from nanochat_ray.on_ray import local_cluster
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer, folder_of
from tests.tiny import TOKENIZER, save_model, tiny_config


def save(root: Store, step: int) -> None:
    model = GPT(tiny_config())
    save_model(root.child("runs", "chat"), step, model, metrics={})


@pytest.mark.parametrize("flags", [{}, {"out": "a", "import_from": "b"}])
def test_it_writes_or_reads(root: Store, flags: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"give either --out, .* or --import-from"):
        export.main(export.Args(storage=root.uri, **flags))


def test_the_named_checkpoint_is_written(
    root: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (1, 2):
        save(root, step)
    loads: list[str] = []
    calls: list[Any] = []
    load_model = checkpoint.load_model

    def load(run: Store, name: str) -> Any:
        loads.append(name)
        return load_model(run, name)

    def write(model: GPT, tokenizer: Tokenizer, out: Store, dtype: torch.dtype) -> None:
        calls.append((type(model), tokenizer.fingerprint, out.uri, dtype))

    monkeypatch.setattr(checkpoint, "load_model", load)
    monkeypatch.setattr(hf, "export", write)
    out = str(tmp_path / "out")
    export.main(export.Args(storage=root.uri, out=out))
    export.main(export.Args(storage=root.uri, out=out, checkpoint="step-000001", precision="bf16"))
    assert loads == ["step-000002", "step-000001"]
    reference = [(GPT, TOKENIZER.fingerprint, out, d) for d in (torch.float32, torch.bfloat16)]
    assert calls == reference
    assert f"{out} holds run chat for transformers" in capsys.readouterr().out


@pytest.mark.parametrize("is_nanochat", [False, True])
def test_a_folder_becomes_a_new_run(
    root: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_nanochat: bool
) -> None:
    model = GPT(tiny_config())
    folder = tmp_path / "theirs"
    folder.mkdir()
    calls: list[str] = []
    monkeypatch.setattr(nanochat, "is_checkpoint", lambda folder: is_nanochat)
    for reader in (hf, nanochat):

        def read(local: Path, name: str = reader.__name__) -> tuple[GPT, Tokenizer]:
            assert local == folder
            calls.append(name.rpartition(".")[2])
            return model, TOKENIZER

        monkeypatch.setattr(reader, "import_folder", read)
    args = export.Args(storage=root.uri, run="theirs", import_from=str(folder))
    export.main(args)
    assert calls == ["nanochat" if is_nanochat else "hf"]
    run = root.child("runs", "theirs")
    assert checkpoint.latest(run) == "step-000000"
    assert checkpoint.load_trainer(run)["about"] == {"taken_from": str(folder)}
    copy, tokenizer = checkpoint.load_model(run)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    assert folder_of(root, TOKENIZER.fingerprint).exists("tokenizer.json")
    for name, weights in model.named_parameters():
        assert torch.equal(weights, copy.get_parameter(name))
    with pytest.raises(ValueError, match="run='theirs' exists already, with step-000000"):
        export.main(args)


@pytest.mark.parametrize(
    ("count", "line"), [(3, "stopped 3 processes of port 7"), (0, "nothing runs for port 7")]
)
def test_stop_says_what_it_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: int, line: str
) -> None:
    monkeypatch.setattr(local_cluster.LocalCluster, "stop", lambda cluster: count)
    stop.main(stop.Args(port=7))
    assert line in capsys.readouterr().out
