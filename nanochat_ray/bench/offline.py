"""Generated tokens a second without HTTP: this engine, vLLM and transformers on equal weights.

    nanochat-ray bench offline --peer-python vllm=/path/to/python transformers=/path/to/python

Each system is a process of its own, one for each number of threads, with the same exported folder
of weights; they take turns, so that what else the machine does falls on all alike. The first round
warms up and is thrown away; each figure is the median of the others. What is compared in the end is
each system's best number of threads. Tokens are greedy, then sampled. The last line is one JSON
object. ``--baseline CHECKOUT`` adds the engine of another checkout of this repository.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import selectors
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from nanochat_ray.checkpoint import hf
from nanochat_ray.checks import check_int, require
from nanochat_ray.cli.flags import overrides
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer

OURS = "nanochat_ray"
PEERS = (OURS, "vllm", "transformers")
BASELINE = "baseline"
SAMPLING = {"greedy": (0.0, 1.0), "sampled": (0.8, 0.95)}
"""Temperature and top_p."""
START_SECONDS, JOB_SECONDS = 300, 300
Prompts = list[list[int]]


def write_model(
    folder: Path, *, layers: int = 6, width: int = 384, sequence_len: int = 2048
) -> int:
    """Exports a model of the classic preset with random weights; returns its vocabulary.

    The blocks' last matrices are not the zeros of a fresh start, or greedy tokens would repeat
    the prompt's and show nothing.
    """
    singles = [bytes([b]) for b in range(256)]
    pairs = [a + b for a in singles for b in singles]
    vocab = 4096
    tokenizer = Tokenizer((singles + pairs)[: vocab - len(SPECIAL_TOKENS)])
    config = ModelConfig.classic(
        vocab_size=vocab,
        n_layer=layers,
        n_head=width // 64,
        n_kv_head=width // 64,
        n_embd=width,
        sequence_len=sequence_len,
    )
    model = GPT(config)
    noise = torch.Generator().manual_seed(0)
    model.init_weights(noise)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                p.copy_(torch.randn(p.shape, generator=noise) / p.size(1) ** 0.5)
    hf.export(model, tokenizer, folder, dtype=torch.float32)
    return vocab


@dataclass
class System:
    """A running system. Every wait has a deadline and names what it waits for."""

    kind: str
    threads: int
    process: subprocess.Popen[str]
    log: Path

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.threads} thread{'s' * (self.threads > 1)}"

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
        """``checkout``: where the engine is imported from, by default this repository."""
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
        system = cls(kind, threads, process, log)
        system._read(START_SECONDS)
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


def random_prompts(rng: random.Random, count: int, length: int, vocab: int) -> Prompts:
    # Bytes only: special tokens sit at the end of the vocabulary.
    return [[rng.randrange(vocab - 16) for _ in range(length)] for _ in range(count)]


def agreement(ours: Prompts, theirs: Prompts) -> float:
    """Share of the prompts whose greedy tokens are all equal."""
    return statistics.mean(float(a == b) for a, b in zip(ours, theirs, strict=True))


def measure(
    systems: Sequence[System], prompts: Prompts, max_tokens: int, repeats: int, sampling: str
) -> tuple[dict[str, float], dict[str, Prompts]]:
    """Median generated tokens a second, and the answers, by system; the systems take turns."""
    seconds: dict[str, list[float]] = {system.name: [] for system in systems}
    answers: dict[str, Prompts] = {}
    for turn in range(repeats + 1):
        for system in systems:
            took, answers[system.name] = system.run(prompts, max_tokens, sampling)
            if turn:
                seconds[system.name].append(took)
    num_tokens = len(prompts) * max_tokens
    return {name: num_tokens / statistics.median(took) for name, took in seconds.items()}, answers


def compare(
    systems: Sequence[System],
    vocab: int,
    batches: Sequence[int],
    prompt_len: int,
    max_tokens: int,
    repeats: int,
) -> dict[str, Any]:
    """Tokens a second by batch size with sampling and by system, the ratios of the best of ours to
    the best of each peer, and how many answers of each system equal those of the first one."""
    rates: dict[str, dict[str, float]] = {}
    ratios: dict[str, dict[str, float]] = {f"decode_vs_{system.kind}": {} for system in systems}
    equal: dict[str, list[float]] = {system.name: [] for system in systems[1:]}
    for batch, sampling in itertools.product(batches, SAMPLING):
        prompts = random_prompts(random.Random(batch), batch, prompt_len, vocab)
        rates_of_system, answers = measure(systems, prompts, max_tokens, repeats, sampling)
        for system in systems[1:]:
            # Other engines have other random numbers.
            if sampling == "greedy" or system.kind in (OURS, BASELINE):
                same = agreement(answers[systems[0].name], answers[system.name])
                equal[system.name] += [same] * batch
        key = f"{batch} {sampling}"
        print(f"B={key}", {k: round(v) for k, v in rates_of_system.items()}, flush=True)
        best: dict[str, float] = {}
        for system in systems:
            best[system.kind] = max(best.get(system.kind, 0.0), rates_of_system[system.name])
        for kind, rate in best.items():
            ratios[f"decode_vs_{kind}"][key] = best[OURS] / rate
        rates[key] = rates_of_system
    del ratios[f"decode_vs_{OURS}"]
    return {"rates": rates, "equal": {k: statistics.mean(v) for k, v in equal.items()}, **ratios}


def shared_prefix(
    on: System,
    off: System,
    vocab: int,
    *,
    num_shared: int,
    own: int,
    max_tokens: int,
    count: int,
    repeats: int,
) -> dict[str, Any]:
    """The same load with the prefix cache on and off. Each turn has another prefix, so that
    nothing of an earlier turn is found."""
    rng = random.Random(7)
    ratios, equal = [], []
    for turn in range(repeats + 1):
        (start,) = random_prompts(rng, 1, num_shared, vocab)
        prompts = [start + tail for tail in random_prompts(rng, count, own, vocab)]
        fast, a = on.run(prompts, max_tokens)
        slow, b = off.run(prompts, max_tokens)
        equal.append(agreement(a, b))
        if turn:
            ratios.append(slow / fast)
    return {"speedup": statistics.median(ratios), "equal": statistics.mean(equal)}


if TYPE_CHECKING:
    EngineFlags = dict[str, Any]
else:
    EngineFlags = overrides(EngineConfig)


@dataclass(frozen=True, kw_only=True)
class Args:
    peer_python: tuple[str, ...] = ()
    """NAME=PATH: a peer (vllm, transformers) and the Python that has it installed."""
    baseline: str = ""
    """Another checkout of this repository, whose engine runs too."""
    batches: tuple[int, ...] = (1, 16, 64)
    prompt_len: int = 256
    max_tokens: int = 128
    repeats: int = 3
    threads: tuple[int, ...] = (1,)
    """Each system runs once with each number of torch threads."""
    prefix: bool = True
    """Measure the shared prefix too (512 tokens shared, 32 own, 16 out, 32 prompts)."""
    engine: EngineFlags = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt_len", "max_tokens", "repeats"):
            check_int(name, getattr(self, name), 1)
        for name in ("batches", "threads"):
            for value in getattr(self, name):
                check_int(name, value, 1)
        if self.baseline:
            package = Path(self.baseline) / "nanochat_ray"
            require(package.is_dir(), "baseline", self.baseline, "a checkout of this repository")


def pythons(pairs: Sequence[str]) -> dict[str, str]:
    """NAME=PATH by name; ValueError if a name is unknown or the path is no file."""
    paths = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if name not in PEERS[1:]:
            raise ValueError(f"peer_python={pair!r} is not allowed: NAME=PATH, NAME one of {PEERS}")
        if not Path(path).is_file():
            raise ValueError(f"peer_python={pair!r} is not allowed: {path!r} is no file")
        paths[name] = path
    return paths


def run(args: Args) -> dict[str, Any]:
    """All of it; see the keys of what it returns."""
    peers = pythons(args.peer_python)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        systems: list[System] = []
        vocab = write_model(folder)

        def start(
            kind: str, threads: int, python: str, options: Mapping[str, Any], checkout: str = ""
        ) -> System:
            log = Path(work) / f"{len(systems)}.log"
            systems.append(System.start(kind, threads, folder, python, options, log, checkout))
            return systems[-1]

        try:
            for threads in args.threads:
                start(OURS, threads, sys.executable, args.engine)
                if args.baseline:
                    start(BASELINE, threads, sys.executable, args.engine, args.baseline)
            for kind, python in peers.items():
                for threads in args.threads:
                    start(kind, threads, python, {})
            shape = (args.batches, args.prompt_len, args.max_tokens, args.repeats)
            result = compare(list(systems), vocab, *shape)
            result["prefix"] = None
            if args.prefix:
                one = args.threads[0]
                on = start(OURS, one, sys.executable, {**args.engine, "prefix_cache_tokens": 8192})
                sizes = {"num_shared": 512, "own": 32, "max_tokens": 16, "count": 32}
                result["prefix"] = shared_prefix(
                    on, systems[0], vocab, repeats=args.repeats, **sizes
                )
        finally:
            for system in systems:
                system.close()
    result["seconds"] = time.perf_counter() - began
    return result


def main(args: Args) -> None:
    print(json.dumps(run(args)))
