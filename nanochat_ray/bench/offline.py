"""Generated tokens a second without HTTP: this engine, vLLM, transformers and llama.cpp.

    nanochat-ray bench offline --peer-python vllm=/path/to/python transformers=/path/to/python
    nanochat-ray bench offline --storage DIR --run c6 --text README.md --num-drafts 0 3 \\
        --precisions fp32 bf16 int8 --peer-python llama.cpp=/path/to/python

Each system is a process of its own, one for each precision, number of threads and number of draft
tokens, with the same exported folder of weights (llama.cpp: a llama of the same sizes). They take
turns, so that what else the machine does falls on all alike. The first round warms up and is not
counted. A turn computes the prompts with one token each, then with all tokens: the difference is
the decoding. Figures are medians over the turns. Ratios compare equal precisions, each side with
its best number of threads, and, as "best", the best of each side. The last line is one JSON object.
``--baseline CHECKOUT`` adds the engine of another checkout of this repository.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from nanochat_ray.bench.environment import machine, text_tokens
from nanochat_ray.bench.load import SAMPLING, random_prompts
from nanochat_ray.bench.offline_system import BASELINE, OURS, PEERS, PRECISIONS, Prompts, System
from nanochat_ray.checkpoint import checkpoint, hf
from nanochat_ray.checks import check_int, require
from nanochat_ray.cli.flags import overrides
from nanochat_ray.engine.config import EngineConfig, EnginePrecision
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.gpt import GPT
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import SPECIAL_TOKENS, Tokenizer


def write_model(
    folder: Path, *, layers: int = 6, width: int = 384, sequence_len: int = 2048
) -> Tokenizer:
    """Exports a model of the classic preset with random weights; returns its tokenizer.

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
    return tokenizer


class Load(NamedTuple):
    """What each system computes in one turn."""

    batch: int
    prompt_len: int
    max_tokens: int
    sampling: str

    @property
    def name(self) -> str:
        if self.max_tokens == 1:
            return f"prefill {self.prompt_len}"
        return f"{self.batch} {self.sampling}"


class Rates(NamedTuple):
    """Median tokens a second: prompts alone, generated tokens alone, and these with prompts."""

    prefill: float
    decode: float
    generate: float


class PromptSource(NamedTuple):
    """Random ids below ``vocab``, or spans of ``text``."""

    vocab: int
    text: Sequence[int] = ()

    def prompts(self, count: int, length: int, seed: int) -> Prompts:
        # Bytes and text only: special tokens sit at the end of the vocabulary.
        spans = random_prompts(
            count, vocab=self.vocab - 16, prompt=length, output=1, seed=seed, text=self.text
        )
        return [prompt.ids for prompt in spans]


def agreement(ours: Prompts, theirs: Prompts) -> float:
    """Share of the prompts whose greedy tokens are all equal."""
    return statistics.mean(float(a == b) for a, b in zip(ours, theirs, strict=True))


def measure(
    systems: Sequence[System], source: PromptSource, load: Load, repeats: int
) -> tuple[dict[str, Rates], dict[str, Prompts]]:
    """Rates and the last answers by system; the systems take turns."""
    seconds: dict[tuple[str, int], list[float]] = {}
    answers: dict[str, Prompts] = {}
    for turn in range(repeats + 1):
        prompts = source.prompts(load.batch, load.prompt_len, 1000 * turn + load.batch)
        for system in systems:
            for max_tokens in sorted({1, load.max_tokens}):
                took, answers[system.name] = system.run(prompts, max_tokens, load.sampling)
                if turn:
                    seconds.setdefault((system.name, max_tokens), []).append(took)
    num_tokens = load.batch * load.max_tokens
    rates = {}
    for system in systems:
        first = statistics.median(seconds[system.name, 1])
        last = statistics.median(seconds[system.name, load.max_tokens])
        prefill = load.batch * load.prompt_len / first
        decode = (num_tokens - load.batch) / (last - first) if last > first else 0.0
        rates[system.name] = Rates(prefill, decode, num_tokens / last)
    return rates, answers


def ratios(systems: Sequence[System], rates: Mapping[str, float], peer: str) -> dict[str, float]:
    """Our rate over a peer's: by precision, without draft tokens and with, and best over best."""
    best: dict[tuple[str, str], float] = {}
    for system in systems:
        drafts = ", drafts" if system.num_drafts else ""
        for label in {system.precision + drafts, "best"}:
            key = system.kind, label
            best[key] = max(best.get(key, 0.0), rates[system.name])
    result = {}
    for (kind, label), rate in best.items():
        theirs = best.get((peer, label.removesuffix(", drafts")), 0.0)
        if kind == OURS and theirs:
            result[label] = rate / theirs
    return result


def compare(
    systems: Sequence[System], source: PromptSource, loads: Sequence[Load], repeats: int
) -> dict[str, Any]:
    """Rates by load and system, their ratios by peer, and how many greedy answers of each system
    equal those of the first one in its precision."""
    rates: dict[str, dict[str, dict[str, float]]] = {}
    peers = dict.fromkeys(system.kind for system in systems if system.kind != OURS)
    by_peer: dict[str, dict[str, dict[str, float]]] = {f"ours_vs_{peer}": {} for peer in peers}
    equal: dict[str, list[float]] = {}
    first: dict[str, str] = {}
    for system in systems:
        first.setdefault(system.precision, system.name)
    for load in loads:
        rates_of_system, answers = measure(systems, source, load, repeats)
        for system in systems:
            # Other engines have other random numbers, and llama.cpp other weights.
            comparable = load.sampling == "greedy" or system.kind in (OURS, BASELINE)
            if system.name != first[system.precision] and comparable and system.kind != "llama.cpp":
                same = agreement(answers[first[system.precision]], answers[system.name])
                equal.setdefault(system.name, []).extend([same] * load.batch)
        measures = ("prefill",) if load.max_tokens == 1 else ("decode", "generate")
        for measure_name in measures:
            key = load.name if load.max_tokens == 1 else f"{load.name} {measure_name}"
            values = {name: getattr(rate, measure_name) for name, rate in rates_of_system.items()}
            rates[key] = values
            print(f"{key}, tokens/s: " + json.dumps({k: round(v) for k, v in values.items()}))
            for peer in peers:
                by_peer[f"ours_vs_{peer}"][key] = ratios(systems, values, peer)
                two_digits = {k: round(v, 2) for k, v in by_peer[f"ours_vs_{peer}"][key].items()}
                print(f"{key}, ours / {peer}: {json.dumps(two_digits)}", flush=True)
    return {"rates": rates, "equal": {k: statistics.mean(v) for k, v in equal.items()}, **by_peer}


def shared_prefix(
    on: System,
    off: System,
    source: PromptSource,
    *,
    num_shared: int,
    own: int,
    max_tokens: int,
    count: int,
    repeats: int,
) -> dict[str, Any]:
    """The same load with the prefix cache on and off. Each turn has another prefix, so that
    nothing of an earlier turn is found."""
    ratios, equal = [], []
    for turn in range(repeats + 1):
        (start,) = source.prompts(1, num_shared, 2 * turn)
        prompts = [start + tail for tail in source.prompts(count, own, 2 * turn + 1)]
        fast, a = on.run(prompts, max_tokens)
        slow, b = off.run(prompts, max_tokens)
        equal.append(agreement(a, b))
        if turn:
            ratios.append(slow / fast)
    return {"speedup": statistics.median(ratios), "equal": statistics.mean(equal)}


if TYPE_CHECKING:
    EngineFlags = dict[str, Any]
else:
    EngineFlags = overrides(EngineConfig, omit=("precision", "num_speculative_tokens"))


@dataclass(frozen=True, kw_only=True)
class Args:
    peer_python: tuple[str, ...] = ()
    """NAME=PATH: a peer (vllm, transformers, llama.cpp) and the Python that has it installed;
    llama.cpp needs the packages llama-cpp-python and gguf."""
    baseline: str = ""
    """Another checkout of this repository, whose engine runs too."""
    storage: str = ""
    """Where --run is."""
    run: str = ""
    """A trained run of the classic preset; by default a model of random weights."""
    text: tuple[str, ...] = ()
    """Files, folders, globs or URIs whose text gives the prompts; by default random ids."""
    precisions: tuple[EnginePrecision, ...] = ("fp32",)
    """Each system runs once with each of these that it has; llama.cpp's int8 is Q8_0."""
    num_drafts: tuple[int, ...] = (0,)
    """Our engine runs once with each number of draft tokens. More than 0 needs a trained run, since
    random weights repeat themselves."""
    batches: tuple[int, ...] = (1, 16, 64)
    prompt_len: int = 256
    max_tokens: int = 128
    prefill: tuple[int, ...] = ()
    """Lengths of single prompts of which only the prefill is measured."""
    sampling: tuple[str, ...] = tuple(SAMPLING)
    """greedy, and sampled: temperature 0.8, top_p 0.95."""
    repeats: int = 3
    threads: tuple[int, ...] = (1,)
    """Each system runs once with each number of threads."""
    prefix: bool = True
    """Measure the shared prefix too (512 tokens shared, 32 own, 16 out, 32 prompts)."""
    engine: EngineFlags = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("prompt_len", "repeats"):
            check_int(name, getattr(self, name), 1)
        check_int("max_tokens", self.max_tokens, 2)
        for name, least in (("batches", 1), ("threads", 1), ("prefill", 1), ("num_drafts", 0)):
            for value in getattr(self, name):
                check_int(name, value, least)
        for name in self.sampling:
            require(name in SAMPLING, "sampling", name, " or ".join(SAMPLING))
        if self.baseline:
            package = Path(self.baseline) / "nanochat_ray"
            require(package.is_dir(), "baseline", self.baseline, "a checkout of this repository")
        is_trained = bool(self.storage and self.run)
        require(is_trained or not self.run + self.storage, "run", self.run, "a run, with --storage")
        only = "0 without a trained --run"
        require(is_trained or not any(self.num_drafts), "num_drafts", self.num_drafts, only)


def pythons(pairs: Sequence[str], names: Sequence[str] = PEERS) -> dict[str, str]:
    """NAME=PATH by name; ValueError if a name is unknown or the path is no file."""
    paths = {}
    for pair in pairs:
        name, _, path = pair.partition("=")
        if name not in names:
            raise ValueError(f"peer_python={pair!r} is not allowed: NAME=PATH, NAME one of {names}")
        if not Path(path).is_file():
            raise ValueError(f"peer_python={pair!r} is not allowed: {path!r} is no file")
        paths[name] = path
    return paths


def export_run(folder: Path, run: Store) -> Tokenizer:
    """Writes the latest checkpoint for the peers; returns its tokenizer."""
    model, tokenizer = checkpoint.load_model(run, checkpoint.resolve(run, ""))
    hf.export(model, tokenizer, folder, dtype=torch.float32)
    return tokenizer


def start_systems(args: Args, folder: Path, work: Path, stack: ExitStack) -> list[System]:
    """All systems of the comparison; ``stack`` ends them."""
    systems: list[System] = []

    def start(
        kind: str, python: str, options: Mapping[str, Any], threads: int, checkout: str = ""
    ) -> None:
        log = work / f"{len(systems)}.log"
        system = System.start(kind, threads, folder, python, options, log, checkout)
        stack.callback(system.close)
        print(f"{system.name}: {system.about}", flush=True)
        systems.append(system)

    for threads, precision in itertools.product(args.threads, args.precisions):
        for num_drafts in args.num_drafts:
            options = {**args.engine, "precision": precision, "num_speculative_tokens": num_drafts}
            start(OURS, sys.executable, options, threads)
            if args.baseline:
                start(BASELINE, sys.executable, options, threads, args.baseline)
        for kind, python in pythons(args.peer_python).items():
            if precision in PRECISIONS[kind]:
                start(kind, python, {"precision": precision}, threads)
    return systems


def run(args: Args) -> dict[str, Any]:
    """All of it; see the keys of what it returns."""
    pythons(args.peer_python)  # before anything is started
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        folder = Path(work) / "model"
        if args.run:
            tokenizer = export_run(folder, Store.at(args.storage).child("runs", args.run))
        else:
            tokenizer = write_model(folder)
        text = text_tokens(args.text, tokenizer) if args.text else []
        source = PromptSource(tokenizer.vocab_size, text)
        about = {"machine": machine(), "model": args.run or "random weights"}
        about["prompts"] = "text" if args.text else "random ids"
        print(json.dumps(about), flush=True)
        systems = start_systems(args, folder, Path(work), stack)
        loads = [
            Load(batch, args.prompt_len, args.max_tokens, sampling)
            for batch, sampling in itertools.product(args.batches, args.sampling)
        ]
        loads += [Load(1, length, 1, "greedy") for length in args.prefill]
        result: dict[str, Any] = {**about, "systems": {s.name: s.about for s in systems}}
        result |= compare(systems, source, loads, args.repeats)
        result["prefix"] = None
        if args.prefix:
            one, options = args.threads[0], {**args.engine, "precision": args.precisions[0]}
            options |= {"num_speculative_tokens": 0, "prefix_cache_tokens": 8192}
            log = Path(work) / "prefix.log"
            on = System.start(OURS, one, folder, sys.executable, options, log)
            stack.callback(on.close)
            sizes = {"num_shared": 512, "own": 32, "max_tokens": 16, "count": 32}
            result["prefix"] = shared_prefix(on, systems[0], source, repeats=args.repeats, **sizes)
    result["seconds"] = time.perf_counter() - began
    return result


def main(args: Args) -> None:
    print(json.dumps(run(args)))
