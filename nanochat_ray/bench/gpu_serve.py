"""Decode, prefill, sampling and weight swaps of an engine on a GPU."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import torch

from nanochat_ray.bench.gpu_checks import answers, make_request
from nanochat_ray.bench.gpu_report import Report, device_ms
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.model.config import ModelConfig, count_parameters
from nanochat_ray.model.gpt import GPT
from nanochat_ray.train import recipe

GIB = 1 << 30
STEPS = 100


def make_engine(config: ModelConfig, **fields: Any) -> Engine:
    model = GPT(config, torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    settings = {"max_num_seqs": 256, "max_num_batched_tokens": 8192, "precision": "bf16"}
    settings |= {"num_speculative_tokens": 0}
    return Engine(model.eval(), EngineConfig(**{**settings, **fields}), device="cuda")


def run(report: Report, quick: bool) -> None:
    for depth in (2,) if quick else (12, 20):
        config = recipe.model_config(depth, 32768, sequence_len=2048)
        report.part(f"d{depth} graphs", _graphs, report, depth, config)
        for count in (2,) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256):
            name = f"d{depth} B={count} greedy"
            report.part(name, _decode, report, name, config, count)
        for params in ({"temperature": 0.8}, {"temperature": 0.8, "top_p": 0.95}):
            count = 2 if quick else 256
            name = f"d{depth} B={count} {params}"
            report.part(name, _decode, report, name, config, count, **params)
        for budget in (512,) if quick else (512, 2048, 8192):
            name = f"d{depth} prefill, max_num_batched_tokens={budget}"
            report.part(name, _prefill, report, name, config, budget)
        report.part(f"d{depth} swap", _swap, report, f"d{depth}", config)


def _graphs(report: Report, depth: int, config: ModelConfig) -> None:
    """Each recorded step alone, with empty contexts: the time to read the weights."""
    start = time.perf_counter()
    engine = make_engine(config)
    seconds, nbytes = time.perf_counter() - start, engine.runner.cache.nbytes
    value = f"{seconds:.1f} s, {nbytes / GIB:.1f} GiB"
    report.note(f"d{depth}: engine of 256 sequences: start, keys and values", value)
    counts = count_parameters(config)
    # Of the embedding tables a step reads a few rows.
    weights = 2 * (counts.matrices + config.n_embd * config.vocab_size)
    graphs = engine.runner.graphs
    assert graphs is not None
    bandwidth = read_bandwidth()
    report.note(f"d{depth}: memory, read", f"{bandwidth / 1e12:.2f} TB/s")
    for size in [s for s in graphs.sizes if s in (1, 8, 16, 32, 64, 128, 256)]:
        ms = device_ms(graphs._recordings[False, size].graph.replay, 30)
        share = weights / (ms / 1e3) / bandwidth
        report.note(
            f"d{depth}: graph of {size} tokens",
            f"{ms * 1e3:.0f} µs, {weights / ms / 1e9:.2f} TB/s, {share:.0%} of the bandwidth",
        )


def read_bandwidth(nbytes: int = 4 * GIB) -> float:
    """Bytes a second of a sum over a long tensor, which nothing of a decode can exceed."""
    numbers = torch.ones(nbytes // 4, device="cuda")
    return nbytes / (device_ms(numbers.sum, 10) / 1e3)


def _decode(report: Report, name: str, config: ModelConfig, count: int, **params: Any) -> None:
    engine = make_engine(config, max_num_seqs=count)
    for i in range(count):
        engine.add(make_request(i, STEPS + 200, 256, **params))
    torch.cuda.synchronize()
    start = time.perf_counter()
    waiting = {str(i) for i in range(count)}
    while waiting:
        waiting -= {output.request_id for output in engine.step()}
    first = time.perf_counter() - start
    times, num_tokens = [], 0
    for _ in range(STEPS):
        start = time.perf_counter()
        num_tokens += sum(len(output.tokens) for output in engine.step())
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    median, slow = statistics.median(times) * 1e3, sorted(times)[STEPS * 9 // 10] * 1e3
    rate = f"{num_tokens / sum(times):,.0f} tokens/s"
    value = f"all began in {first * 1e3:.0f} ms; step {median:.2f} ms (p90 {slow:.2f}), {rate}"
    report.note(name, value)


def _prefill(report: Report, name: str, config: ModelConfig, budget: int) -> None:
    engine = make_engine(config, max_num_seqs=64, max_num_batched_tokens=budget)
    requests = [make_request(i, 1, 1024) for i in range(64)]
    answers(engine, requests[:8])
    # Another first token, so that no prefix is cached.
    requests = [dataclasses.replace(r, prompt=[7, *r.prompt[1:]]) for r in requests]
    start = time.perf_counter()
    answers(engine, requests)
    rate = 64 * 1024 / (time.perf_counter() - start)
    report.note(name, f"{rate:,.0f} tokens/s")


def _swap(report: Report, name: str, config: ModelConfig) -> None:
    """Weights are replaced in place, so memory and KV cache stay."""
    engine = make_engine(config)
    weights = GPT(config, torch.bfloat16).state_dict()
    engine.load_weights(weights)
    before = torch.cuda.memory_reserved()
    start = time.perf_counter()
    for _ in range(4):
        engine.load_weights(weights)
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / 4
    report.note(f"{name}: load_weights", f"{seconds * 1e3:.0f} ms")
    report.check_equal(f"{name}: memory after 4 swaps", torch.cuda.memory_reserved(), before)
