"""A running system of ``bench offline``: a process that takes prompts and gives tokens."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from nanochat_ray.bench.load import SAMPLING

OURS = "nanochat_ray"
PRECISIONS = {
    OURS: ("fp32", "bf16", "int8"),
    "vllm": ("fp32", "bf16"),
    "transformers": ("fp32", "bf16"),
    "llama.cpp": ("fp32", "bf16", "int8"),
}
"""What a system can run in; llama.cpp's int8 is Q8_0."""
PEERS = tuple(PRECISIONS)[1:]
BASELINE = "baseline"
"""Our engine of another checkout."""
START_SECONDS, JOB_SECONDS = 600, 300
Prompts = list[list[int]]


@dataclass
class System:
    """A running system. Every wait has a deadline and names what it waits for."""

    kind: str
    threads: int
    precision: str
    num_drafts: int
    """Draft tokens of a step, at most; peers have none."""
    process: subprocess.Popen[str]
    log: Path
    about: str = ""
    """Version, kernels and what else it says of itself."""

    @property
    def name(self) -> str:
        drafts = f", {self.num_drafts} drafts" if self.num_drafts else ""
        return f"{self.kind} {self.precision}, {self.threads} threads{drafts}"

    @classmethod
    def start(
        cls,
        kind: str,
        threads: int,
        folder: Path,
        python: str,
        options: Mapping[str, Any],
        log: Path,
        checkout: str = "",
    ) -> Self:
        """``options``: ``precision``, and fields of an ``EngineConfig`` for our engines.
        ``checkout``: where the engine is imported from, by default this repository."""
        # One thread has nobody to wait for; more wait for each other at every operation, and OpenMP
        # has them spin then, as long as there are cores for all.
        settings = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        if checkout:
            settings["PYTHONPATH"] = checkout
        if kind == "vllm":
            settings |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        if kind == "vllm" and threads > 1:
            # Its other processes need a core now and then, and it is slower with endless spinning.
            settings |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "GOMP_SPINCOUNT": "20000"}
        script = Path(__file__).with_name("offline_peer.py")
        with log.open("w") as errors:
            process = subprocess.Popen(
                [
                    *(python, str(script), OURS if kind == BASELINE else kind),
                    *(str(folder), json.dumps(dict(options))),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "HF_HUB_OFFLINE": "1", **settings},
            )
        num_drafts = options.get("num_speculative_tokens", 0)
        system = cls(kind, threads, options["precision"], num_drafts, process, log)
        system.about = system._read(START_SECONDS)["about"]
        return system

    def _read(self, seconds: float) -> dict[str, Any]:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            ready = selector.select(timeout=seconds)
        line = self.process.stdout.readline() if ready else ""
        if not line:
            self.close()
            why = "ended" if ready else f"said nothing for {seconds:.0f} s"
            raise RuntimeError(f"{self.name} {why}; its log: {self.log.read_text()[-2000:]}")
        return json.loads(line)

    def run(
        self, prompts: Prompts, max_tokens: int, sampling: str = "greedy"
    ) -> tuple[float, Prompts]:
        """Seconds and the tokens of each answer."""
        assert self.process.stdin is not None
        temperature, top_p = SAMPLING[sampling]
        job = {"prompts": prompts, "max_tokens": max_tokens}
        job |= {"temperature": temperature, "top_p": top_p}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self._read(JOB_SECONDS)
        return answer["seconds"], answer["tokens"]

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
