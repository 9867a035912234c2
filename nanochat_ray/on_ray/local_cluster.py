"""A Ray cluster of this machine that belongs to one endpoint port, closed by a token.

Other Rays may run on the machine, so nothing here calls ``ray stop``, which would end them all:
every process that is started carries NANOCHAT_CLUSTER in its environment, and those alone are
ended. Importing this file needs no Ray.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import psutil

from nanochat_ray.on_ray import ports
from nanochat_ray.storage import user_folder

MARK = "NANOCHAT_CLUSTER"
RAY = (sys.executable, "-m", "ray.scripts.scripts")
PORT_FLAGS = (
    *("--port", "--dashboard-port", "--ray-client-server-port"),
    *("--metrics-export-port", "--dashboard-agent-listen-port"),
)
PORTS = range(20_100, 23_000)
"""Below the range from which the system takes ports for outgoing connections and the blocks of Ray
Serve (``ports``), above the range that Ray gives to its workers: a port that is free there stays
free until Ray binds it."""
TRIES, ROUNDS, ROUND_S = 3, 20, 0.5
"""Tries to start; rounds of signals until the processes have ended, the second half SIGKILL."""


def state_folder(port: int) -> Path:
    return user_folder("XDG_STATE_HOME", ".local/state") / "nanochat_ray" / str(port)


class LocalCluster:
    """The cluster of the endpoint at ``port``; it may have been started by an earlier command."""

    def __init__(self, port: int):
        self.port = port
        self.folder = state_folder(port)
        self.logs = self.folder / "logs"
        self._mark = f"nanochat_ray-{port}"

    @property
    def _address_file(self) -> Path:
        """``export NAME=value`` lines, so that a shell can source them too."""
        return self.folder / "address"

    def variables(self) -> dict[str, str]:
        """RAY_ADDRESS, the token and Serve's ports; empty if no cluster was started."""
        try:
            lines = self._address_file.read_text(encoding="utf-8").splitlines()
        except OSError:
            return {}
        words = [shlex.split(line) for line in lines if line.startswith("export ")]
        return dict(word[1].split("=", 1) for word in words)

    def environment(self) -> dict[str, str]:
        """Environment of a process that talks to the cluster."""
        paths = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
        quiet = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1"}
        quiet |= {"RAY_USAGE_STATS_ENABLED": "0", "PATH": os.pathsep.join(paths)}
        return {**os.environ, **quiet, MARK: self._mark, **self.variables()}

    def processes(self) -> set[psutil.Process]:
        """The cluster's, without this one and those that it was started from.

        Also what they have started themselves: the title of a Python process of Ray's overwrites
        its environment, and an agent lives for a minute after its raylet.
        """
        outside = {psutil.Process(), *psutil.Process().parents()}
        members: set[psutil.Process] = set()
        for process in psutil.process_iter():
            try:
                if process not in members | outside and process.environ().get(MARK) == self._mark:
                    members |= {process, *process.children(recursive=True)}
            except psutil.Error:
                continue
        return members - outside

    def is_alive(self) -> bool:
        """Whether the dashboard answers with this cluster's token."""
        variables = self.variables()
        if not variables:
            return False
        token = {"Authorization": f"Bearer {variables.get('RAY_AUTH_TOKEN', '')}"}
        url = f"{variables['RAY_API_SERVER_ADDRESS']}/api/version"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers=token), timeout=5) as r:
                r.read()
        except (OSError, ValueError):
            return False
        return True

    def start(self, gpus: int) -> None:
        """Starts a head node on loopback. Raises ValueError with the end of its log."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / "ray.log"
        for number in range(1, TRIES + 1):
            self.stop()
            flags = self._choose_address()
            url = self.variables()["RAY_API_SERVER_ADDRESS"]
            print_step(f"starting Ray (log: {log}, dashboard: {url})")
            if self._start_head(flags, gpus, log):
                return
            print_step(f"Ray did not start at try {number} of {TRIES}")
        tail = "\n".join(log.read_text(errors="replace", encoding="utf-8").splitlines()[-20:])
        print(tail, file=sys.stderr)
        raise ValueError(f"Ray did not start; its log is {log}")

    def _choose_address(self) -> list[str]:
        """Writes the address file with free ports and a new token; returns the flags of the ports.

        The dashboard binds loopback, but Ray's other ports bind every interface: a token guards
        them.
        """
        numbers = free_ports(len(PORT_FLAGS))
        variables = {
            "RAY_ADDRESS": f"127.0.0.1:{numbers[0]}",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{numbers[1]}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            # Two clusters on one host must not answer each other's requests.
            **ports.serve_environment(),
        }
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in variables.items()]
        self._address_file.unlink(missing_ok=True)
        descriptor = os.open(self._address_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.writelines(lines)
        return [f"{flag}={n}" for flag, n in zip(PORT_FLAGS, numbers, strict=True)]

    def _start_head(self, flags: list[str], gpus: int, log: Path) -> bool:
        environment = self.environment()
        # Ray tells a job the address of the machine's latest cluster; ours knows its own
        # (session.cluster_address).
        environment["NANOCHAT_RAY_ADDRESS"] = environment.pop("RAY_ADDRESS")
        environment = {**ports.SETTINGS, **environment}
        command = [*RAY, "start", "--head", "--node-ip-address=127.0.0.1"]
        command += ["--dashboard-host=127.0.0.1", *flags, f"--num-gpus={gpus}"]
        # More logical CPUs than cores: the tasks of Ray Data run beside the training workers.
        command += [f"--num-cpus={max(8, os.cpu_count() or 1)}", "--disable-usage-stats"]
        memory = os.environ.get("NANOCHAT_OBJECT_STORE", "500000000")
        command.append(f"--object-store-memory={memory}")
        with log.open("wb") as output:
            result = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                check=False,
            )
        return result.returncode == 0

    def stop(self) -> int:
        """Ends the cluster's processes and waits for them; returns how many there were."""
        count = len(processes := self.processes())
        for number in range(ROUNDS):
            if not processes:
                break
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGTERM if number < ROUNDS // 2 else signal.SIGKILL)
            time.sleep(ROUND_S)
            processes = set(filter(_is_alive, processes)) | self.processes()
        if processes:
            ids = sorted(process.pid for process in processes)
            raise ValueError(f"these processes do not end: {' '.join(map(str, ids))}")
        self._remove_haproxy_files()
        return count

    def _remove_haproxy_files(self) -> None:
        folder = self.variables().get(ports.STATE_BASE, "").rstrip("/")
        if Path(folder).name.startswith("nanochat-"):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def free_ports(count: int) -> list[int]:
    """``count`` free ports of PORTS. Raises OSError if there are fewer."""
    sockets: list[socket.socket] = []
    try:
        for port in random.SystemRandom().sample(PORTS, len(PORTS)):
            if len(sockets) == count:
                return [s.getsockname()[1] for s in sockets]
            try:
                sockets.append(socket.create_server(("", port)))
            except OSError:
                continue
        raise OSError(f"fewer than {count} ports from {PORTS.start} to {PORTS.stop} are free")
    finally:
        for s in sockets:
            s.close()


def print_step(text: str) -> None:
    """A bold line with the time of day."""
    print(f"\033[1m[{time.strftime('%H:%M:%S')}] {text}\033[0m", flush=True)
