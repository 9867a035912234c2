"""The Ray jobs of ``nanochat-ray quickstart``: each is a command of this program."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from nanochat_ray.on_ray.local_cluster import RAY, LocalCluster, print_step

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
NOTICES = re.compile(
    r"\d{4}-[\d-]+ [\d:,]+\s+(INFO|SUCC|WARN)"
    r"|\([A-Za-z_:]+ [^)]*(pid|ip)="
    r"|(INFO|WARNING) [\d-]+ "
    r"|(Tailing logs|Job submission|Running entrypoint|[- ]*$)"
)
"""Ray's own lines, which stay in the log."""
SUGGESTIONS = (
    "Who are you?",
    "What is 47 + 38 - 9?",
    "How many legs do 3 spiders and 2 dogs have?",
    "What can you do?",
)
"""What the chat page offers: questions of the kinds that the model learns."""
WORKER = re.compile(r"^\(RayTrainWorker [^)]*\) (?=step \d)")
"""What Ray Train puts before a worker's progress."""


class Jobs:
    """The stages over the runs of one quickstart. A job that fails ends the program with its
    status, unless its stage may be left out."""

    def __init__(self, cluster: LocalCluster, storage: str, tag: str, *, gpus: int):
        self.cluster = cluster
        self.storage = storage
        self.tag, self.base_run, self.chat_run = tag, f"base-{tag}", f"chat-{tag}"
        self.gpus = gpus
        self._workers = ["--workers", str(gpus or 2), *(["--gpus"] if gpus else [])]

    def rl_run(self, steps: int | None) -> str:
        """``steps``: those that the user has named."""
        return f"rl{'' if steps is None else steps}-{self.tag}"

    def log(self, name: str) -> Path:
        return self.cluster.logs / f"{name}.log"

    def prepare_base(self, text: Sequence[str]) -> None:
        flags = ["--dataset", self.base_run]
        flags += ["--vocab-size", "32768", "--sequence-len", "2048"] if self.gpus else []
        flags += ["--text", *text] if text else []
        self._run("prepare-base", "prepare", "--stage", "base", *flags)

    def train_base(self, depth: int, minutes: float | None) -> None:
        flags = ["--dataset", self.base_run, "--run", self.base_run, "--depth", str(depth)]
        self._run("train-base", "train", "--stage", "base", *flags, *self._length(minutes))

    def prepare_sft(self) -> None:
        flags = ["--dataset", self.chat_run, "--tokenizer", self.base_run]
        self._run("prepare-sft", "prepare", "--stage", "sft", *flags)

    def train_sft(self, minutes: float | None, epochs: float | None) -> None:
        flags = ["--dataset", self.chat_run, "--run", self.chat_run, "--parent", self.base_run]
        flags += ["--epochs", str(epochs)] if epochs is not None else []
        self._run("train-sft", "train", "--stage", "sft", *flags, *self._length(minutes))

    def train_rl(self, run: str, steps: int) -> bool:
        """Whether it succeeded."""
        flags = ["--run", run, "--parent", self.chat_run, *self._workers]
        flags += ["--steps", str(steps), "--eval-every", str(steps), "--print-every", "5"]
        return self._run("rl", "rl", *flags, may_fail=True)

    def serve(self, run: str, port: int) -> None:
        flags = ["--run", run, "--name", self.chat_run, "--port", str(port)]
        flags += ["--gpus", "1"] if self.gpus else []
        flags += ["--suggestions", *SUGGESTIONS]
        self._run("serve", "serve", "--no-block", *flags)

    def evaluate(self, run: str) -> None:
        """Accuracy on fresh questions, once for each run."""
        name = f"eval-{run}"
        if self.log(name).exists():
            return
        print_step(f"measuring on fresh questions (log: {self.log(name)})")
        flags = ["--device", "cuda", "--engine.precision", "bf16"] if self.gpus else []
        self._run(name, "eval", "--run", run, "--count", "200", *flags)

    def forget_eval(self, run: str) -> None:
        self.log(f"eval-{run}").unlink(missing_ok=True)

    def _length(self, minutes: float | None) -> list[str]:
        bound = [] if minutes is None else ["--cpu-minutes", str(minutes)]
        return [*self._workers, *bound]

    def _run(self, name: str, command: str, *flags: str, may_fail: bool = False) -> bool:
        """Submits ``nanochat-ray COMMAND``, prints its lines and stores all of them in its log.
        Returns whether it succeeded."""
        entrypoint = [sys.executable, "-m", "nanochat_ray", command, "--storage", self.storage]
        submit = [*RAY, "job", "submit", "--log-style=record", "--log-color=false", "--"]
        process = subprocess.Popen(
            [*submit, *entrypoint, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=self.cluster.environment(),
        )
        assert process.stdout is not None
        with process.stdout, self.log(name).open("w", encoding="utf-8") as log:
            for line in process.stdout:
                log.write(line)
                log.flush()
                if (text := user_line(line)) is not None:
                    print(text, flush=True)
        if status := process.wait():
            # An evaluation that failed is measured again.
            if command == "eval":
                self.log(name).rename(self.log(f"{name}-failed"))
                name = f"{name}-failed"
            print_step(f"{name} failed; its log is {self.log(name)}")
            if not may_fail:
                raise SystemExit(status)
        return status == 0


def user_line(line: str) -> str | None:
    """A line of a job as the user sees it; None for one of Ray's own."""
    text = COLOUR.sub("", line.rstrip("\n"))
    text = WORKER.sub("", text)
    return None if NOTICES.match(text) else text
