"""Equalities between a GPU and the CPU: training, kernels, engine, sampler."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanochat_ray.bench.gpu_report import Report, relative_error
from nanochat_ray.engine import sampler
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.kvcache.memory import make_allocator
from nanochat_ray.engine.kvcache.paged_cache import PagedCache
from nanochat_ray.engine.model import InferenceModel
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.model.config import ModelConfig
from nanochat_ray.model.fp8 import fp8_linear
from nanochat_ray.model.gpt import GPT
from nanochat_ray.optim.sharded import ShardedOptimizer
from nanochat_ray.train.config import TrainConfig
from nanochat_ray.train.step import Batch, train_step

CUDA = torch.device("cuda")
MODELS: dict[str, dict[str, Any]] = {
    "full attention": {"window_pattern": "L"},
    "windows": {},
    "documents": {"document_start": 7},
    "grouped heads": {"n_head": 4, "n_kv_head": 2},
    "skips and gates": {"skips": True, "attention_gate": True},
}


def small_config(**fields: Any) -> ModelConfig:
    shape: dict[str, Any] = {"vocab_size": 512, "n_layer": 4, "n_head": 2, "n_kv_head": 2}
    shape |= {"n_embd": 256, "sequence_len": 512, "window_pattern": "SSSL"}
    return ModelConfig.modern(**shape | fields)


def make_model(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> GPT:
    """No weight is zero, so that every part of the model counts."""
    model = GPT(config, dtype)
    model.init_weights(torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=noise))
    return model.to(device)


def run(report: Report) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = {
        "fused forward": check_forward,
        "engine": check_engine,
        "engine, batch-invariant": check_batch_invariance,
        "sampler": check_sampler,
        "training steps": check_training,
        "fp8": check_fp8,
    }
    for name, check in checks.items():
        report.part(name, check, report)
    for name, fields in MODELS.items():
        report.part(f"gradients, {name}", check_gradients, report, name, small_config(**fields))


def check_gradients(report: Report, name: str, config: ModelConfig) -> None:
    """Loss and gradients: float32 on both, bf16, and compiled bf16."""
    size = (4, 513)
    ids = torch.randint(512, size, generator=torch.Generator().manual_seed(1))

    def gradients(
        dtype: torch.dtype, device: torch.device | str, is_compiled: bool = False
    ) -> list[Tensor]:
        model = make_model(config, dtype, device)
        if is_compiled:
            model.compile_blocks()
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        loss = model.loss(inputs.to(device), targets.to(device), reduction="mean")
        loss.backward()
        return [loss, *(p.grad for p in model.parameters() if p.grad is not None)]

    def worst(values: list[Tensor], references: list[Tensor]) -> float:
        pairs = zip(values, references, strict=True)
        return max(relative_error(value, reference) for value, reference in pairs)

    def worst_rounded(values: list[Tensor], references: list[Tensor]) -> float:
        """Of the matrices, and of the whole gradient. That of a scalar or a small gate is a sum of
        large terms that cancel, of which bf16 leaves few digits."""
        pairs = list(zip(values, references, strict=True))
        large = [pair for pair in pairs if pair[1].numel() > 1024]
        whole = (torch.cat([p[side].float().flatten().cpu() for p in pairs]) for side in (0, 1))
        return max(relative_error(*pair) for pair in [(*whole,), *large])

    exact = gradients(torch.float32, "cpu")
    single = gradients(torch.float32, CUDA)
    report.check(f"{name}: fp32, against the CPU", worst(single, exact), 1e-4)
    eager = gradients(torch.bfloat16, CUDA)
    report.check(f"{name}: bf16, against fp32", worst_rounded(eager, exact), 1e-1)
    from_blocks = gradients(torch.bfloat16, CUDA, is_compiled=True)
    report.check(f"{name}: compiled bf16, against bf16", worst_rounded(from_blocks, eager), 5e-2)


def check_training(report: Report) -> None:
    """Five steps on both devices; the same bits when run again."""
    config = small_config()
    ids = torch.randint(512, (4, 513), generator=torch.Generator().manual_seed(1)).numpy()

    def weights(device: str, precision: Any, size: int, is_compiled: bool = False) -> Tensor:
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        model = make_model(config, dtype, device).train()
        if is_compiled:
            model.compile_blocks()
        train = TrainConfig(
            steps=20, global_batch_size=4, micro_batch_size=size, precision=precision
        )
        optimizer = ShardedOptimizer(model, train.optim, dtype)
        for step in range(5):
            train_step(model, optimizer, Batch(ids), step, train)
        return torch.cat([p.detach().flatten().cpu() for p in model.parameters()])

    on_gpu = weights("cuda", "fp32", 4)
    error = relative_error(on_gpu, weights("cpu", "fp32", 4))
    report.check("5 steps in fp32: weights, against the CPU", error, 1e-3)
    error = relative_error(weights("cuda", "fp32", 2), on_gpu)
    report.check("the same, in 2 micro-batches", error, 1e-3)
    for is_compiled in (False, True):
        first, second = (weights("cuda", "bf16", 4, is_compiled) for _ in range(2))
        name = f"5 steps in bf16, {'compiled' if is_compiled else 'eager'}: bitwise equal again"
        report.check_equal(name, torch.equal(first, second), True)


def check_fp8(report: Report) -> None:
    x = torch.randn(4096, 768, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(3072, 768, device=CUDA, requires_grad=True)
    y = fp8_linear(x, weight)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    exact = x.detach().float() @ weight.detach().T
    report.check("fp8 matmul", relative_error(y, exact), 5e-2)
    assert x.grad is not None
    assert weight.grad is not None
    exact = upstream.float() @ weight.detach()
    report.check("… gradient of x", relative_error(x.grad, exact), 8e-2)
    exact = upstream.float().T @ x.detach().float()
    report.check("… gradient of the weight", relative_error(weight.grad, exact), 8e-2)


STEPS = (
    [255, 256, 257, 1, 600, 40],
    [1] * 6,
    [1, 1, 1, 700, 1, 3],
    [1] * 6,
)
"""Tokens of each slot in a step, at the edges of blocks, tiles and windows."""


def check_forward(report: Report) -> None:
    """The fused forward over the paged cache, against the operators one by one on the CPU."""
    for name, fields in MODELS.items():
        shape = {"sequence_len": 2048, "n_embd": 512, "n_head": 4, "n_kv_head": 4}
        config = small_config(**shape | fields)
        weights = make_model(config, torch.float32, "cpu").state_dict()
        exact = _forward(config, weights, "cpu", torch.float32)
        for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
            results = _forward(config, weights, "cuda", dtype)
            error = max(relative_error(*pair) for pair in zip(results, exact, strict=True))
            report.check(f"forward, {name}: {dtype}, against the CPU", error, most)
        results = _forward(config, weights, "cuda", torch.bfloat16, torch.float8_e4m3fn)
        error = max(relative_error(*pair) for pair in zip(results, exact, strict=True))
        # Keys and values are rounded by 2^-4 at most, 2^-5.8 in the mean square.
        report.check(f"forward, {name}: FP8 keys and values, against the CPU", error, 1e-1)


@torch.inference_mode()
def _forward(
    config: ModelConfig,
    weights: dict[str, Tensor],
    device_name: str,
    dtype: torch.dtype,
    kv_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Hidden states of ``STEPS``."""
    device = torch.device(device_name)
    model = InferenceModel(config, weights, dtype=dtype, device=device)
    settings = EngineConfig(max_num_seqs=6, max_num_batched_tokens=2048)
    blocks = make_allocator(config, settings, 2048, dtype, 1 << 33)
    cache = PagedCache(config, blocks, 6, 2048, kv_dtype or dtype, device)
    tables, lengths, results = [blocks.empty_tables() for _ in range(6)], [0] * 6, []
    generator = torch.Generator().manual_seed(2)
    for counts in STEPS:
        is_decode = max(counts) == 1
        spans = [Span(i, lengths[i], n, is_decode) for i, n in enumerate(counts)]
        for span in spans:
            assert blocks.extend(tables[span.slot], span.start, span.start + span.num_tokens)
            cache.set_block_tables(span.slot, tables[span.slot])
        cache.prepare(spans)
        ids = torch.randint(512, (2, sum(counts)), generator=generator).to(device)
        results.append(model.hidden(ids[0], ids[1], cache).cpu())
        lengths = [length + n for length, n in zip(lengths, counts, strict=True)]
    return results


def make_request(i: int, max_tokens: int, length: int = 40, **params: Any) -> Request:
    prompt = np.random.default_rng(i).integers(1, 500, length).tolist()
    settings = {"temperature": 0.0, "seed": i, "max_tokens": max_tokens} | params
    return Request(id=str(i), prompt=prompt, params=SamplingParams(**settings))


def answers(engine: Engine, requests: list[Request]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {request.id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            if output.error:
                raise RuntimeError(output.error)
            tokens[output.request_id] += output.tokens
    engine.check_integrity()
    return tokens


def _engine_model() -> GPT:
    config = small_config(sequence_len=2048, n_embd=512, n_head=4, n_kv_head=4)
    return make_model(config, torch.bfloat16, CUDA).eval().requires_grad_(False)


def _make_engine(model: GPT, **fields: Any) -> Engine:
    settings = {"max_num_seqs": 32, "max_num_batched_tokens": 256, "precision": "bf16"}
    return Engine(model, EngineConfig(**{**settings, **fields}))


def check_batch_invariance(report: Report) -> None:
    """With ``batch_invariant`` completions are equal alone, among others, and without graphs."""
    model = _engine_model()
    requests = [
        make_request(i, 48, 20 + 37 * i % 700, temperature=0.8 * (i % 2)) for i in range(24)
    ]

    def completions(has_graphs: bool, **fields: Any) -> dict[str, list[int]]:
        engine = _make_engine(model, batch_invariant=True, **fields)
        if not has_graphs:
            engine.runner.graphs = None
        return answers(engine, requests)

    base = completions(True)
    variants: dict[str, tuple[bool, dict[str, Any]]] = {
        "one at a time": (True, {"max_num_seqs": 1}),
        "without graphs": (False, {}),
        "prompts in one step": (True, {"max_num_batched_tokens": 8192, "prefill_chunk": 512}),
    }
    for name, (has_graphs, fields) in variants.items():
        results = completions(has_graphs, **fields)
        num_same = sum(results[key] == base[key] for key in base)
        report.check_equal(f"batch-invariant engine: equal, {name}", num_same, len(base))


def check_engine(report: Report) -> None:
    """Greedy tokens against the whole model, and equal tokens whatever the schedule."""
    model = _engine_model()

    def make_engine(**fields: Any) -> Engine:
        return _make_engine(model, **fields)

    requests = [make_request(i, 48, 20 + 37 * i % 700) for i in range(24)]
    base = answers(make_engine(), requests)
    num_equal = total = 0
    for request in requests[:8]:
        for i, token in enumerate(base[request.id]):
            logits = _last_logits(model, [*request.prompt, *base[request.id][:i]])
            num_equal, total = num_equal + int(logits.argmax() == token), total + 1
    # bf16 roundings differ between the two, so that close logits may change places.
    report.check("engine: greedy tokens unlike the whole model's", 1 - num_equal / total, 0.05)
    variants: dict[str, dict[str, Any]] = {
        "synchronous": {"async_scheduling": "off"},
        "no drafts": {"num_speculative_tokens": 0},
        "prompts in one step": {"max_num_batched_tokens": 8192, "prefill_chunk": 512},
        "one at a time": {"max_num_seqs": 1},
        "no prefix cache": {"prefix_cache_tokens": 0},
    }
    for name, fields in variants.items():
        results = answers(make_engine(**fields), requests)
        num_same = sum(results[key] == base[key] for key in base)
        report.note(f"engine: equal completions, {name}", f"{num_same} of {len(base)}")
        gaps = [_gap(model, r.prompt, results[r.id], base[r.id]) for r in requests]
        # cuBLAS chooses kernels by the size of a batch; logits of bf16 have 8 bits.
        report.check("… logits between the first unequal tokens", max(gaps), 4 * 2.0**-8)
    sampled_requests = [make_request(i, 48, temperature=0.8, top_p=0.9) for i in range(24)]
    first, second = (answers(make_engine(), sampled_requests) for _ in range(2))
    num_same = sum(first[key] == second[key] for key in first)
    report.check_equal("engine: equal sampled completions when run again", num_same, len(first))


@torch.inference_mode()
def _last_logits(model: GPT, tokens: list[int]) -> Tensor:
    return model(torch.tensor([tokens], device=CUDA))[0, -1]


def _gap(model: GPT, prompt: Sequence[int], tokens: list[int], others: list[int]) -> float:
    """Between the logits of the first two tokens that differ, as a share of the largest logit."""
    for i, (token, other) in enumerate(zip(tokens, others, strict=False)):
        if token != other:
            logits = _last_logits(model, [*prompt, *tokens[:i]])
            return float((logits[token] - logits[other]).abs() / logits.abs().max())
    return 0.0


def check_sampler(report: Report) -> None:
    """Tokens of the GPU's sampler are the CPU's, but for edges within rounding."""
    S, V = 64, 32768
    logits = 3 * torch.randn(S, V, generator=torch.Generator().manual_seed(0))
    columns = {"temperature": torch.full((S,), 0.8), "top_k": torch.full((S,), 50)}
    columns |= {"top_p": torch.full((S,), 0.9, dtype=torch.float64), "min_p": torch.zeros(S)}
    rows = sampler.Rows(**columns, seed=torch.arange(S), widest=50)
    gpu_columns = {
        f.name: getattr(rows, f.name).to(CUDA)
        for f in dataclasses.fields(rows)
        if isinstance(getattr(rows, f.name), Tensor)
    }
    gpu_rows = dataclasses.replace(rows, **gpu_columns)
    positions = torch.arange(S)
    from nanochat_ray.engine import triton_sampler

    features = sampler.SAMPLED | sampler.TOP_K | sampler.TOP_P
    exact = sampler.choose(logits, rows, positions, features)
    for name, result in {
        "torch": sampler.choose(logits.to(CUDA), gpu_rows, positions.to(CUDA), features),
        "Triton": triton_sampler.choose_by_slot(
            gpu_rows, logits.to(CUDA), positions.to(CUDA), positions.to(CUDA)
        ),
    }.items():
        share = float((result.cpu() != exact).float().mean())
        report.check(f"sampler in {name}: tokens unlike the CPU's", share, 0.02)
