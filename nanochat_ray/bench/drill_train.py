"""Kill parts of a training run on Ray at random moments, and compare the weights it ends with.

    nanochat-ray drill-train --train="--dataset base --depth 2 --save-every 10 --restarts 50"
    nanochat-ray drill-train --parts worker driver --rounds 5 --train="--dataset base"
    nanochat-ray drill-train --parts outage --break-command "ip link set n1 down" \\
        --mend-command "ip link set n1 up" --outage-s 30 --train="--dataset base"
    nanochat-ray drill-train --command rl --parts engine worker controller driver --rounds 5 \\
        --train="--parent chat --steps 60 --save-every 1"

The command ``nanochat-ray train``, or ``rl``, with the flags of --train runs twice: undisturbed,
then with one SIGKILL after the other. A run that ends early is started again by the same command.
Parts are worker, controller, driver, raylet, gcs and the engines of ``rl``, of the Ray that the
command starts or of that at RAY_ADDRESS on this host, and outage: two commands of yours that break
something and mend it, such as a link, a storage server or a pod. The drill sends signals to
processes of the cluster: use it on one that may be disturbed. Status 1 if a tensor of the weights
or of the optimizer differs in a bit, or if a round has no new checkpoint in time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import psutil

from nanochat_ray.bench import chart, drill
from nanochat_ray.checks import check_float, check_int, check_name, require
from nanochat_ray.storage import Store, absolute, default_root

TITLES = {
    "worker": r"ray::.*RayTrainWorker",
    "controller": r"ray::TrainController",
    "engine": r"ray::FleetEngine",
    "raylet": drill.PARTS["raylet"],
    "gcs": drill.PARTS["gcs"],
}
"""Part → what the command line of its processes begins with."""
PARTS = (*TITLES, "driver", "outage")
PROGRAM = (sys.executable, "-m", "nanochat_ray")
POLL_S = 0.1
LOG_TAIL = 3000
"""Characters of the command's output that an error shows."""


@dataclass(frozen=True, kw_only=True)
class Args:
    train: str
    """Flags of the command, without --storage and --run."""
    command: Literal["train", "rl"] = "train"
    """What trains."""
    storage: str = field(default_factory=default_root)
    """Folder, s3:// or gs:// that holds the dataset and gets the runs."""
    run: str = "drill"
    """Name of the disturbed run, which must not exist; the other is RUN-undisturbed, and is not
    trained again if it is complete."""
    parts: tuple[str, ...] = ("worker", "controller", "driver")
    """What to disturb, of the parts above."""
    rounds: int = 1
    """Disturbances of each part."""
    delay_s: float = 2.0
    """At most, from a new checkpoint to a disturbance."""
    recover_s: float = 180.0
    """How long a new checkpoint may take."""
    break_command: str = ""
    """Shell command that begins an outage."""
    mend_command: str = ""
    """Shell command that ends it."""
    outage_s: float = 10.0
    """Seconds between the two."""
    session: str = ""
    """Name of the Ray session, where this host has several."""
    seed: int = 0
    """Of moments and processes."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "storage", absolute(self.storage))
        check_name("run", self.run)
        for name in self.parts:
            require(name in PARTS, "parts", name, f"of {', '.join(PARTS)}")
        has_commands = bool(self.break_command and self.mend_command)
        requirement = "outage needs break_command and mend_command"
        require(has_commands or "outage" not in self.parts, "parts", "outage", requirement)
        check_int("rounds", self.rounds, 1)
        check_int("seed", self.seed, 0)
        for name in ("delay_s", "recover_s", "outage_s"):
            check_float(name, getattr(self, name), above=True)


@dataclass
class Round:
    """What one disturbance did."""

    part: str
    checkpoint: str
    """The latest one until a killed process was replaced, or right before an outage."""
    recovery_s: float | None = None
    """From the disturbance until there was a newer one; None: not within the time."""
    restarts: int = 0
    """How often the command had to be given again."""


def has_supervisor(train: str) -> bool:
    """Whether flags of nanochat-ray train make it a supervisor, whose child trains."""
    return re.search(r"--restarts[= ]+0*[1-9]", train) is not None


class Command:
    """The command of one run, in a process of its own."""

    def __init__(self, args: Args, run: str, log: Path):
        self.store = Store.at(args.storage).child("runs", run)
        own = ("--storage", args.storage, "--run", run)
        self._argv = [*PROGRAM, args.command, *own, *shlex.split(args.train)]
        self._has_supervisor = has_supervisor(args.train)
        self._log = log
        self._latest = ""
        joins = os.environ.get("RAY_ADDRESS", "") not in ("", "local")
        self._cluster = drill.Cluster(args.session) if joins else None
        self.restarts = 0
        self._start()

    def _start(self) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(self._argv, stdout=output, stderr=output)

    @property
    def latest(self) -> str:
        """Name of the latest checkpoint that the storage has shown, also while it does not answer;
        "" before the first."""
        with contextlib.suppress(OSError):
            self._latest = max(self._latest, _latest(self.store))
        return self._latest

    def runs(self, *, again: bool) -> bool:
        """Whether it still runs; one that failed is started again if ``again``. Raises ValueError
        with its output if it failed and may not be."""
        status = self._process.poll()
        if status is None or status == 0:
            return status is None
        if not again:
            raise ValueError(f"the command ended with status {status}: {self.output[-LOG_TAIL:]}")
        self.restarts += 1
        self._start()
        return True

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def processes(self, part: str) -> list[psutil.Process]:
        """Those of the part: of the Ray that the command has started, else of this host's."""
        process = psutil.Process(self._process.pid)
        if part == "driver":
            # A supervisor's only child is the driver.
            return process.children() if self._has_supervisor else [process]
        if self._cluster is not None:
            return self._cluster.matching(TITLES[part])
        return [p for p in process.children(recursive=True) if drill.matches(p, TITLES[part])]

    def end(self) -> None:
        """Ends it, with the Ray that it has started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
        self._process.wait()


def disturb(args: Args, command: Command, part: str, rng: random.Random) -> Round:
    """One round, from a new checkpoint to the next that follows the disturbance. Raises ValueError
    if the run is complete before it."""
    time.sleep(rng.uniform(0.0, args.delay_s))
    requirement = f"the run was complete before a disturbance of {part}: train longer"
    require(command.runs(again=True), "rounds", args.rounds, requirement)
    restarts, start = command.restarts, time.monotonic()
    if part == "outage":
        counts = Round(part, command.latest)
        subprocess.run(args.break_command, shell=True, check=True)
        time.sleep(args.outage_s)
        subprocess.run(args.mend_command, shell=True, check=True)
    else:
        group, before = _kill_one(command, part, rng, start + args.recover_s)
        if args.mend_command:
            subprocess.run(args.mend_command, shell=True, check=True)
        counts = Round(part, _await_replacement(command, group, before, start + args.recover_s))
    if _await_checkpoint(command, counts.checkpoint, start + args.recover_s, again=True):
        counts.recovery_s = time.monotonic() - start
    counts.restarts = command.restarts - restarts
    return counts


def _kill_one(
    command: Command, part: str, rng: random.Random, deadline: float
) -> tuple[str, list[psutil.Process]]:
    """Waits for a process of the part: the run may still be starting again. Returns the part whose
    new processes continue the run, and those that it had: workers outlive the other parts."""
    while not (processes := command.processes(part)):
        requirement = "the run has no such process on this host"
        require(time.monotonic() < deadline, "parts", part, requirement)
        time.sleep(POLL_S)
    group = "worker" if part in ("controller", "driver") and command.processes("worker") else part
    before = command.processes(group)
    rng.choice(processes).kill()
    return group, before


def _await_replacement(
    command: Command, part: str, before: Sequence[psutil.Process], deadline: float
) -> str:
    """Waits until the part has a process that it had not ``before``, or the run is complete.
    Returns the latest checkpoint until then, which is no recovery: what is published meanwhile
    comes from workers that go on for a moment without their driver or controller."""
    latest = command.latest
    while command.runs(again=True) and time.monotonic() < deadline:
        if any(process not in before for process in command.processes(part)):
            break
        latest = command.latest
        time.sleep(POLL_S)
    return latest


def _await_checkpoint(command: Command, latest: str, deadline: float, *, again: bool) -> bool:
    """Whether there is a checkpoint after ``latest`` in time."""
    while time.monotonic() < deadline:
        is_running = command.runs(again=again)
        if command.latest > latest:
            return True
        if not is_running:
            break
        time.sleep(POLL_S)
    return False


@contextlib.contextmanager
def _command(args: Args, run: str, folder: Path) -> Iterator[Command]:
    one = Command(args, run, folder / f"{run}.log")
    try:
        yield one
    finally:
        one.end()


def drill_run(args: Args, folder: Path) -> list[Round]:
    """Rounds in the order in which they happened; the run is complete then. Raises ValueError if
    it is before the last round, or if training fails by itself."""
    rng = random.Random(args.seed)
    rounds: list[Round] = []
    with _command(args, args.run, folder) as command:
        deadline = time.monotonic() + args.recover_s
        require(
            _await_checkpoint(command, "", deadline, again=False),
            *("recover_s", args.recover_s, f"the run has no checkpoint yet: {command.output}"),
        )
        for number in range(args.rounds):
            for part in args.parts:
                rounds.append(disturb(args, command, part, rng))
                cells = " | ".join(_row(part, rounds[-1:]))
                print(f"round {number + 1}: {cells}", file=sys.stderr, flush=True)
        while command.runs(again=True):
            time.sleep(POLL_S)
    return rounds


def train_undisturbed(args: Args, run: str, folder: Path) -> None:
    """Raises ValueError with the command's output if training fails."""
    with _command(args, run, folder) as command:
        while command.runs(again=False):
            time.sleep(POLL_S)


def _latest(run: Store) -> str:
    """Name of the latest checkpoint; "" without one."""
    from nanochat_ray.checkpoint import checkpoint  # needs torch, which --help does without

    return checkpoint.latest(run) or ""


def sha256(run: Store) -> str:
    """Of the weights and the optimizer's state of the run's latest checkpoint, and its step."""
    from nanochat_ray.checkpoint import checkpoint

    latest = checkpoint.load(run, optimizer=True)
    digest = hashlib.sha256(str(latest.step).encode())
    tensors = {**latest.weights, **(latest.optimizer or {})}
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _row(part: str, rounds: Sequence[Round]) -> list[str]:
    times = [r.recovery_s for r in rounds]
    cells = [part, str(len(rounds)), str(sum(r.restarts for r in rounds))]
    cells += [drill.seconds_of(times, statistics.median), drill.seconds_of(times, max)]
    return cells


def table(rounds: Sequence[Round]) -> str:
    head = ["part", "disturbances", "command given again"]
    head += ["median time to a new checkpoint (s)", "longest (s)"]
    parts = dict.fromkeys(r.part for r in rounds)
    return chart.markdown(head, *(_row(p, [r for r in rounds if r.part == p]) for p in parts))


def main(args: Args) -> int:
    runs = Store.at(args.storage).child("runs")
    names = (f"{args.run}-undisturbed", args.run)
    has_run = bool(_latest(runs.child(args.run)))
    require(not has_run, "run", args.run, "it exists in the storage: name another")
    with TemporaryDirectory(prefix="nanochat-drill-") as folder:
        train_undisturbed(args, names[0], Path(folder))
        rounds = drill_run(args, Path(folder))
    digests = [sha256(runs.child(name)) for name in names]
    is_equal = digests[0] == digests[1]
    print(table(rounds))
    print(f"weights and optimizer: {'bitwise equal' if is_equal else 'NOT EQUAL'}, {digests}")
    fields = [dataclasses.asdict(r) for r in rounds]
    print(json.dumps({"rounds": fields, "bitwise_equal": is_equal, "sha256": digests}))
    return 0 if is_equal and all(r.recovery_s is not None for r in rounds) else 1
