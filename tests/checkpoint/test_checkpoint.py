"""A checkpoint is whole or it is not there; what is damaged is refused by name."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import msgpack
import numpy as np
import pytest
import torch

from nanochat_ray.checkpoint import checkpoint
from nanochat_ray.checkpoint.codec import read_tensors, write_tensors
from nanochat_ray.checkpoint.reader import read_manifest
from nanochat_ray.config import to_json
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer
from tests.tiny import TOKENIZER, tiny_config


def save(run: Store, step: int) -> GPT:
    model = GPT(tiny_config())
    model.init_weights(torch.Generator().manual_seed(step))
    checkpoint.save(
        run,
        step,
        model_config=model.config,
        weights=dict(model.named_parameters()),
        optimizer={"x/momentum": torch.full((3,), float(step))},
        trainer={"step": step},
        tokenizer=TOKENIZER,
    )
    return model


def same(run: Store, model: GPT) -> None:
    model_back, tokenizer = checkpoint.load_model(run)
    assert tokenizer.fingerprint == TOKENIZER.fingerprint
    for name, weight in model.named_parameters():
        assert torch.equal(model_back.get_parameter(name), weight)


def test_what_is_saved_comes_back(root: Store) -> None:
    assert checkpoint.latest(root) is None
    save(root, 5)
    model = save(root, 10)
    same(root, model)
    back = checkpoint.load(root, optimizer=True)
    assert (back.step, back.trainer) == (10, {"step": 10})
    assert back.optimizer is not None
    assert back.optimizer["x/momentum"].tolist() == [10, 10, 10]
    assert checkpoint.load(root, "step-000005", optimizer=False).step == 5


def test_the_same_on_s3(s3: str) -> None:
    run = Store.at(s3).child("runs", "checkpoint")
    save(run, 1)
    model = save(run, 2)
    same(run, model)
    checkpoint.prune(run, 1)
    assert [name for name in run.list() if name.startswith("step")] == ["step-000002"]
    same(run, model)


def test_crash_while_saving_keeps_the_last(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(root, 5)
    real, writes_left = Store.write_bytes, 0

    def dying(self: Store, name: str, data: bytes) -> None:
        nonlocal writes_left
        writes_left -= 1
        if writes_left < 0:
            raise OSError("the machine is gone")
        real(self, name, data)

    monkeypatch.setattr(Store, "write_bytes", dying)
    for num_writes in range(4):  # the manifest is the fourth
        writes_left = num_writes
        with pytest.raises(OSError, match="gone"):
            save(root, 6)
        same(root, model)
    monkeypatch.undo()
    checkpoint.prune(root, 3)
    same(root, save(root, 6))


def test_prune_keeps_the_newest(root: Store) -> None:
    for step in range(1, 6):
        save(root, step)
    root.child("step-000002").delete("manifest.json")
    root.write_text("step-000009/config.json", "{}")  # under way somewhere else
    checkpoint.prune(root, 2)
    steps = [name for name in root.list() if name.startswith("step")]
    assert steps == ["step-000004", "step-000005", "step-000009"]


FILES = ("config.json", "weights.msgpack", "optimizer.msgpack", "trainer.json", "tokenizer.json")


@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_damaged_file_is_named(root: Store, file: str) -> None:
    save(root, 3)
    path = Path(root.root) / "step-000003" / file
    whole = path.read_bytes()
    for at in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=rf"{file} is damaged"):
            checkpoint.load(root, optimizer=True)
    path.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=rf"{file} is damaged"):
        checkpoint.load(root, optimizer=True)
    path.unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing"):
        checkpoint.load(root, optimizer=True)


def test_other_tokenizers_are_refused(root: Store) -> None:
    other = Tokenizer.train(["some other text " * 50], 300)
    model = GPT(tiny_config())
    model.init_weights(torch.Generator().manual_seed(0))
    arguments = {"model_config": model.config, "weights": dict(model.named_parameters())}
    for tokenizer, run in ((TOKENIZER, "one"), (other, "two")):
        checkpoint.save(
            root.child(run), 1, **arguments, optimizer=None, trainer={}, tokenizer=tokenizer
        )
    folder, source = root.child("one", "step-000001"), root.child("two", "step-000001")
    manifest = folder.read_text("manifest.json")
    theirs = read_manifest(source, 1)["tokenizer.json"]
    ours = read_manifest(folder, 1)["tokenizer.json"]
    folder.write_text("tokenizer.json", source.read_text("tokenizer.json"))
    manifest = manifest.replace(ours["sha256"], theirs["sha256"])
    manifest = manifest.replace(f'"size": {ours["size"]}', f'"size": {theirs["size"]}')
    folder.write_text("manifest.json", manifest)
    with pytest.raises(ValueError, match="is not the one that the weights were trained with"):
        checkpoint.load(root.child("one"), optimizer=False)


def test_tensors_of_every_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    floats = {str(d): torch.randn(3, 5).to(d) for d in (torch.float32, torch.bfloat16)}
    tensors = {
        **floats,
        "half": torch.randn(7).half(),
        "ints": torch.arange(6).view(2, 3),
        "bools": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5),
        "turned": torch.randn(4, 6).T,
    }
    stream = io.BytesIO()
    write_tensors(stream, tensors)
    size = stream.tell()
    stream.seek(0)
    back = read_tensors(stream, size)
    assert list(back) == list(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name], tensor)
    with pytest.raises(ValueError, match="complex64 cannot be stored"):
        write_tensors(io.BytesIO(), {"x": torch.zeros(1, dtype=torch.complex64)})


def test_rubbish_is_a_value_error() -> None:
    stream = io.BytesIO()
    write_tensors(stream, {"a": torch.randn(20, 20), "b": torch.arange(9)})
    good = stream.getvalue()
    rng = np.random.default_rng(0)
    for number in range(400):
        bad = bytearray(good)
        kind = number % 4
        if kind == 0:
            bad = bad[: rng.integers(len(bad))]
        elif kind == 1:
            for at in rng.integers(0, 120, size=3):
                bad[at] = rng.integers(256)
        elif kind == 2:
            bad = bytearray(rng.bytes(int(rng.integers(200))))
        else:
            at = int(rng.integers(len(bad)))
            bad[at:at] = rng.bytes(5)
        try:
            read_tensors(io.BytesIO(bytes(bad)), len(bad))
        except ValueError:
            continue
    huge = {"name": "a", "dtype": "float32", "shape": [1 << 40], "chunks": 1 << 18}
    head = {"format": "nanochat_ray tensors 1", "tensors": 1}
    with pytest.raises(ValueError, match="does not fit into its file"):
        read_tensors(io.BytesIO(msgpack.packb(head) + msgpack.packb(huge)), 1000)


def test_newest_complete_one_is_the_latest(root: Store, caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save(root, step)
    for pointer in ("", "step-000001\n", "step-000099", "\udcff", "../other"):
        root.write_bytes("latest", pointer.encode(errors="surrogateescape"))
        assert checkpoint.latest(root) == "step-000003"
    root.delete("latest")
    assert checkpoint.load(root, optimizer=False).step == 3
    assert "the file latest is missing or empty" in caplog.text
    root.delete("step-000003")
    save(root, 2)
    root.write_text("latest", "step-000003")
    root.write_text("step-000004/config.json", "{}")
    assert checkpoint.load(root, optimizer=False).step == 2
    assert "step-000004 is incomplete (it has no manifest.json): skipped" in caplog.text
    assert "latest names 'step-000003'; the newest complete checkpoint is step-000002" in (
        caplog.text
    )


FOREIGN = ("step-000002-good", "step-", "step-2", "step-0000002", "step-²", "step--00001", "notes")


def test_foreign_names_are_left_alone(root: Store) -> None:
    save(root, 1)
    for name in FOREIGN:
        root.write_text(f"{name}/manifest.json", "{}")
    for step in (2, 3):
        save(root, step)
        checkpoint.prune(root, 1, keep_best=True)
    assert checkpoint.latest(root) == "step-000003"
    assert checkpoint.best(root) is None
    assert root.list() == sorted([*FOREIGN, "latest", "step-000003"])
    for name in ("../x", *FOREIGN[1:]):
        with pytest.raises(ValueError, match=r"(checkpoint|name)=.* is not allowed"):
            checkpoint.load_config(root, name)


def test_nan_and_inf_are_refused(root: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save(root, 1)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    state = {"x/momentum": torch.ones(3)}
    for file, tensors, name in (
        ("weights.msgpack", weights, "lm_head.weight"),
        ("optimizer.msgpack", state, "x/momentum"),
    ):
        tensors[name].view(-1)[-1] = float("nan")
        # Written past the check that saving makes, as an older program may have done.
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "not_finite", lambda tensors: None)
            checkpoint.save(
                root,
                2,
                model_config=model.config,
                weights=weights,
                optimizer=state,
                trainer={},
                tokenizer=TOKENIZER,
            )
        with pytest.raises(ValueError, match=rf"{file}: {name} has values that are not finite"):
            checkpoint.load(root, optimizer=True)
        tensors[name].view(-1)[-1] = 0.0


def test_misfit_tokenizers_are_refused(root: Store) -> None:
    model = GPT(tiny_config(vocab_size=300))
    checkpoint.save(
        root,
        1,
        model_config=model.config,
        weights=dict(model.named_parameters()),
        optimizer=None,
        trainer={},
        tokenizer=TOKENIZER,
    )
    with pytest.raises(ValueError, match=r"tokenizer\.json has 265 tokens, .* vocab_size=300"):
        checkpoint.load_model(root)


def edit_manifest(root: Store, **changes: object) -> None:
    path = Path(root.root) / "step-000003" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"format": "other"}, r"manifest\.json is damaged: format='other'"),
        ({"step": 4}, r"manifest\.json is of step 4, not 3"),
        ({"files": []}, r"manifest\.json is damaged: files=\[\]"),
        ({"files": {"a": {"size": 1.5, "sha256": ""}}}, r"manifest\.json is damaged: files="),
        ({"files": {"a": {"size": 1, "sha256": None}}}, r"manifest\.json is damaged: files="),
        ({"files": {}}, r"config\.json is missing from the manifest"),
    ],
)
def test_a_damaged_manifest_is_named(root: Store, changes: dict[str, object], error: str) -> None:
    save(root, 3)
    edit_manifest(root, **changes)
    with pytest.raises(ValueError, match=error):
        checkpoint.load(root, optimizer=False)


def edit_config(root: Store, **changes: object) -> None:
    """Changes config.json, and its entry in the manifest."""
    folder = Path(root.root) / "step-000003"
    data = json.dumps({**json.loads((folder / "config.json").read_text()), **changes}).encode()
    (folder / "config.json").write_bytes(data)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files["config.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(root, files=files)


def test_a_misfit_configuration_is_named(root: Store) -> None:
    save(root, 3)
    for changes, error in (
        ({"tokenizer": 5}, r"config\.json: tokenizer=5 is no fingerprint"),
        ({"model": {"n_layer": 0}}, r"config\.json: .*missing"),
    ):
        edit_config(root, **{"tokenizer": TOKENIZER.fingerprint, **changes})
        with pytest.raises(ValueError, match=error):
            checkpoint.load_config(root)
    for fields, error in (
        ({"n_layer": 99}, r"n_layer=99, n_embd=32 and 320 tokens .* embeddings \[320, 32\]"),
        ({"n_embd": 64}, r"n_embd=64 and 320 tokens"),
        ({"n_layer": 3}, r"does not fit the model: 'resid_lambdas' is \[2\], expected \[3\]"),
    ):
        edit_config(root, model=to_json(tiny_config(**fields)), tokenizer=TOKENIZER.fingerprint)
        with pytest.raises(ValueError, match=error):
            checkpoint.load_model(root)


def test_recorded_bytes_of_tensors() -> None:
    """MessagePack by hand: a header, then of each tensor its head and little-endian values."""
    stream = io.BytesIO()
    write_tensors(stream, {"w": torch.tensor([[1.0, -2.0]]), "n": torch.tensor(258)})
    assert stream.getvalue() == b"".join(
        (
            b"\x82\xa6format\xb6nanochat_ray tensors 1\xa7tensors\x02",
            b"\x84\xa4name\xa1w\xa5dtype\xa7float32\xa5shape\x92\x01\x02\xa6chunks\x01",
            b"\xc4\x08\x00\x00\x80\x3f\x00\x00\x00\xc0",
            b"\x84\xa4name\xa1n\xa5dtype\xa5int64\xa5shape\x90\xa6chunks\x01",
            b"\xc4\x08\x02\x01\x00\x00\x00\x00\x00\x00",
        )
    )


def test_manifest_has_each_files_hash(root: Store) -> None:
    save(root, 3)
    folder = Path(root.root) / "step-000003"
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    digest = files["weights.msgpack"]["sha256"]
    assert checkpoint.weights_digest(root, "step-000003") == digest
