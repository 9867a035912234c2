"""What a drill counts, over scripted answers and real processes that stand in for Ray's."""

from __future__ import annotations

import asyncio
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from nanochat_ray.bench import drill
from nanochat_ray.bench.drill import Args, Cluster, Round, Streams
from nanochat_ray.bench.http_stream import Result
from tests.waiting import wait_for

SESSION = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
PROGRAM = """
import subprocess, sys
# exec -a: the title that Ray gives the process. A shell, since other programs may go by their name.
command = ["bash", "-c", 'exec -a "$0" bash -c read']
children = [subprocess.Popen([*command, title], stdin=subprocess.PIPE) for title in sys.argv[2:]]
print("ready", flush=True)
sys.stdin.read()
for child in children:
    child.kill()
    child.wait()
"""


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A gcs_server that names its session, and a raylet whose children are replicas."""
    gcs = [sys.executable, "-c", PROGRAM, f"--session={SESSION}"]
    titles = ["ray::ServeReplica:nanochat:engine", "ray::ServeReplica:nanochat:ingress"]
    command = [*gcs, *titles, titles[0]]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(drill, "_sessions", lambda: iter([SESSION]))
            one = Cluster()
            # A process has its title when it has replaced the shell that began it.
            wait_for(lambda: len(one.matching("ray::")) == len(titles) + 1)
            yield one
        process.communicate(b"")


def test_parts_are_the_processes_of_one_session(cluster: Cluster) -> None:
    assert len(cluster.processes("engine")) == 2
    assert len(cluster.processes("ingress")) == 1
    assert cluster.processes("gcs") == []
    cluster.session = "session_of_another"
    assert cluster.processes("engine") == []


def test_several_clusters_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drill, "_sessions", lambda: iter(["session_a", "session_b"]))
    with pytest.raises(ValueError, match="session='' is not allowed: one of session_a, session_b"):
        Cluster()
    assert Cluster("session_b").session == "session_b"
    with pytest.raises(ValueError, match="session='session_c'"):
        Cluster("session_c")


SERVER = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


def test_the_session_of_the_endpoint_is_drilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when another one serves there after a restart."""
    monkeypatch.setattr(drill, "_sessions", lambda: iter(["session_a", "session_b"]))
    runner = "import subprocess, sys; subprocess.run([sys.executable, '-c', sys.argv[2]])"
    command = [sys.executable, "-c", runner, "--session=session_b/logs", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}"
        cluster = Cluster("", url)
        assert cluster.session == "session_b"
        cluster.session = "session_a"
        cluster.look_for_successor()
        assert cluster.session == "session_b"
        process.communicate(b"")
    cluster.look_for_successor()
    assert cluster.session == "session_b"


def result(text: str = "abc", error: str = "", gaps: tuple[float, ...] = (), first: float = 0.1):
    return Result(0.0, first_s=first, gaps_s=list(gaps), text=text, error=error)


def test_counts_by_hand() -> None:
    streams = Streams(Args(), "m", [], [])
    streams._count(result("other"), "abc")  # before the signal: not of a round
    counts = streams.round = Round("engine", 1)
    for one in (
        result(gaps=(0.1, 2.5)),
        result("abd", gaps=(0.2,)),
        result(error="the connection ended", gaps=(3.0,)),
        result(error="status 503", first=0.0),
    ):
        streams._count(one, "abc")
    assert (counts.answers, counts.changed_answers) == (2, 1)
    assert (counts.broken_streams, counts.refused_requests) == (1, 1)
    assert counts.longest_gap_s == 3.0


def test_table_and_failures_by_hand() -> None:
    rounds = [
        Round("engine", 1, 0, 0, 1, 10, 0.5, 3.0, 8.0),
        Round("engine", 2, 0, 0, 0, 10, 1.5, 9.0, 7.0),
        Round("ingress", 3, 4, 0, 2, 5, 0.1, 2.0, 2.0),
        Round("dashboard", 4, 0, 0, 0, 5, 0.1, 0.5),  # which Ray does not start again
    ]
    lines = drill.table(rounds).splitlines()
    assert lines[2] == "| engine | 2 | 20 | 0 | 0 | 1 | 1.50 | 1.50 | 9.0 | 8.0 |"
    assert lines[3] == "| ingress | 1 | 5 | 4 | 0 | 2 | 0.10 | 0.10 | 2.0 | 2.0 |"
    assert lines[4] == "| dashboard | 1 | 5 | 0 | 0 | 0 | 0.10 | 0.10 | 0.5 | never |"
    assert drill.failures(rounds) == []  # the streams of an ingress end with it
    bad = [Round("engine", 1, 1, 2, recovery_s=1.0), Round("gcs", 2)]
    assert drill.failures(bad) == [
        "engine: 2 answers changed",
        "engine: 1 streams broke",
        "engine: it was not replaced in time",
        "gcs: the endpoint did not answer again in time",
    ]


@pytest.mark.parametrize("kind", ["kill", "stop"])
def test_a_signal_reaches_one_process(
    cluster: Cluster, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drill, "STEADY_S", 0.0)
    recover_s = 0.5 if kind == "kill" else 60.0
    args = Args(signal=kind, stop_s=0.2, recover_s=recover_s, watch_s=0.0)
    streams = Streams(args, "m", [], [])
    if kind == "stop":
        streams.last_answer = math.inf  # so the round ends when the process counts again
    before = cluster.processes("engine")
    signals: list[int] = []
    monkeypatch.setattr(psutil.Process, "send_signal", lambda self, number: signals.append(number))
    rng = random.Random(0)
    monkeypatch.setattr(rng, "uniform", lambda low, high: 0.0)
    counts = asyncio.run(drill.disturb(args, cluster, streams, "engine", rng))
    assert counts.process_id in {process.pid for process in before}
    if kind == "kill":
        assert counts.recovery_s is None  # nobody answers here
    assert (counts.replacement_s is None) == (kind == "kill")  # one that was stopped continues
    assert signals == ([signal.SIGSTOP, signal.SIGCONT] if kind == "stop" else [])
    wait_for(lambda: len(cluster.processes("engine")) == (1 if kind == "kill" else 2))


def test_bad_flags_are_refused() -> None:
    for bad in ({"parts": ("engine", "moon")}, {"signal": "hug"}, {"rounds": 0}, {"stop_s": 0.0}):
        with pytest.raises(ValueError, match=r"is not allowed"):
            Args(**bad)
