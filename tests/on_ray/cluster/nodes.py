"""A Ray cluster of several nodes on one host, whose links can be cut.

Each node has a network namespace with an address of its own on one bridge, a PID namespace, and its
own /tmp/ray and /tmp/haproxy-serve, as a host would. (Ray looks for its raylet among the processes:
it must not see those of other nodes.) The first node is the head. The tests' own process is another
host on the bridge.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.waiting import wait_for

REPO = Path(__file__).parents[3]
PORT = 6379
RAY = (sys.executable, "-m", "ray.scripts.scripts")
PRIVATE_FOLDERS = ("/tmp/ray", "/tmp/haproxy-serve")
START_S = 120.0
UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--mount-proc")
INIT = "sleep infinity & wait"
"""A node's first process: it collects the exit status of those that have lost their parent."""


def missing_requirement() -> str:
    """Why this host cannot have such a cluster; "" if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"nanochat-{os.getpid()}"
    for command in (
        ("ip", "netns", "add", name),
        ("ip", "link", "add", f"nc{os.getpid()}", "type", "veth", "peer", "netns", name),
        ("ip", "netns", "exec", name, *UNSHARE, "env", "--chdir=/", "true"),
        ("ip", "netns", "delete", name),
    ):
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return f"the command {command[0]} is missing"
        if result.returncode:
            subprocess.run(("ip", "netns", "delete", name), capture_output=True, check=False)
            return f"{' '.join(command)}: {result.stderr.strip()}"
    return ""


@dataclass(frozen=True)
class Node:
    name: str
    """Of its namespace."""
    link: str
    """The bridge's end of its link."""
    address: str
    folder: Path

    def command(self, argv: Sequence[str]) -> list[str]:
        """``argv`` as a command that runs on the node, in its folder."""
        (init,) = self.processes("sh -c .*" + INIT)
        namespaces = ["--net", "--mount", "--pid"]
        return [
            *("nsenter", f"--target={init.pid}", *namespaces),
            *("env", f"--chdir={self.folder}", *argv),
        ]

    def processes(self, title: str = "") -> list[psutil.Process]:
        """The node's processes whose command line begins with the regular expression."""
        listing = _run("ip", "netns", "pids", self.name)
        processes = []
        for pid in map(int, listing.split()):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if re.match(title, " ".join(process.cmdline())):
                    processes.append(process)
        return processes


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Nodes:
    """The nodes and their Ray, from ``start`` to ``close``."""

    def __init__(self, folder: Path, count: int = 3, cpus: int = 3):
        self.folder, self.cpus = folder, cpus
        self._bridge = f"nb{os.getpid()}"
        # Of the range for tests of networks (RFC 2544), which no host has.
        self._network = f"198.18.{os.getpid() % 256}"
        self.host = f"{self._network}.254"
        """The address of the tests' own process on the bridge."""
        self.nodes = [
            Node(
                name=f"nanochat-{os.getpid()}-{i}",
                link=f"nl{os.getpid()}-{i}",
                address=f"{self._network}.{i + 1}",
                folder=folder / f"node{i}",
            )
            for i in range(count)
        ]
        self.head = self.nodes[0]
        self._first_processes: dict[str, subprocess.Popen[bytes]] = {}
        self.gcs_address = f"{self.head.address}:{PORT}"
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(REPO),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # As in cluster/Dockerfile: a node that does not answer counts as dead after 12 s.
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "3",
            # A head that starts again knows its cluster, for which the nodes wait.
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(folder / "gcs"),
            "RAY_gcs_rpc_server_reconnect_timeout_s": "300",
            # Ray's 15 would starve them on a host that does something else too.
            "RAY_worker_niceness": "0",
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        }

    def start(self) -> None:
        """Connects the nodes and forms the cluster."""
        _run("ip", "link", "add", self._bridge, "type", "bridge")
        _run("ip", "address", "add", f"{self.host}/24", "dev", self._bridge)
        _run("ip", "link", "set", self._bridge, "up")
        for node in self.nodes:
            for path in PRIVATE_FOLDERS:
                Path(path).mkdir(mode=0o777, exist_ok=True)
                (node.folder / Path(path).name).mkdir(parents=True)
            _run("ip", "netns", "add", node.name)
            inner = ("peer", "name", "eth0", "netns", node.name)
            _run("ip", "link", "add", node.link, "type", "veth", *inner)
            _run("ip", "link", "set", node.link, "master", self._bridge, "up")
            inside = ("ip", "-n", node.name)
            _run(*inside, "address", "add", f"{node.address}/24", "dev", "eth0")
            for interface in ("lo", "eth0"):
                _run(*inside, "link", "set", interface, "up")
        for node in self.nodes:
            self.boot(node)
            self.start_ray(node)

    def boot(self, node: Node) -> None:
        """Starts the node's first process, with which all others of the node end."""
        binds = [f"mount --bind {node.folder / Path(path).name} {path}" for path in PRIVATE_FOLDERS]
        script = "; ".join(["set -e", *binds, INIT])
        command = ["ip", "netns", "exec", node.name, *UNSHARE, "sh", "-c", script]
        self._first_processes[node.name] = subprocess.Popen(command, start_new_session=True)
        wait_for(lambda: node.processes("sleep infinity"), 30, f"the first process of {node.name}")

    def start_ray(self, node: Node) -> None:
        """Returns when the node is part of the cluster."""
        options = [f"--node-ip-address={node.address}", f"--num-cpus={self.cpus}"]
        options += ["--object-store-memory=100000000", "--disable-usage-stats"]
        role = [f"--address={self.gcs_address}"]
        if node is self.head:
            role = ["--head", f"--port={PORT}", f"--dashboard-host={node.address}"]
        self.run(node, [*RAY, "start", *role, *options], timeout_s=START_S)

    def run(
        self,
        node: Node,
        argv: Sequence[str],
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 300.0,
    ) -> str:
        """What a command on the node writes. Raises AssertionError with it if the command fails."""
        result = subprocess.run(
            node.command(argv),
            env={**self.environment, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-4000:]
        return result.stdout

    def start_process(
        self, node: Node, argv: Sequence[str], log: Path, environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        """A command on the node that goes on; it writes to ``log``."""
        with log.open("ab") as output:
            return subprocess.Popen(
                node.command(argv),
                env={**self.environment, **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def restore(self, node: Node) -> None:
        """Starts a node again that was cut or that has lost processes."""
        self.join(node)
        self.kill(node)
        self.boot(node)
        self.start_ray(node)

    def cut(self, node: Node) -> None:
        """Cuts the node's link: what is sent to it or by it is lost, and no connection closes."""
        _run("ip", "link", "set", node.link, "down")

    def join(self, node: Node) -> None:
        """Undoes ``cut``."""
        _run("ip", "link", "set", node.link, "up")

    def kill(self, node: Node) -> None:
        """Ends every process of the node at once, as a loss of power does."""
        for process in node.processes("sh -c .*" + INIT):
            process.kill()
        if first := self._first_processes.pop(node.name, None):
            first.wait(timeout=30)
        wait_for(lambda: not node.processes(), 30, f"the end of {node.name}'s processes")

    def close(self) -> None:
        """Ends the processes of all nodes; removes the namespaces and the bridge."""
        for node in self.nodes:
            with contextlib.suppress(subprocess.CalledProcessError):
                self.kill(node)
                _run("ip", "netns", "delete", node.name)
        with contextlib.suppress(subprocess.CalledProcessError):
            _run("ip", "link", "delete", self._bridge)
