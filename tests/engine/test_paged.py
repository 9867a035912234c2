"""Paged keys and values, by the reference that gathers them, against slots and the definition."""

from __future__ import annotations

import dataclasses
import random
from itertools import pairwise
from typing import Any

import pytest
import torch

from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kvcache.base import Span
from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator, BlockTables
from nanochat_ray.engine.kvcache.block_pool import NULL_BLOCK
from nanochat_ray.engine.kvcache.build import choose_layout
from nanochat_ray.engine.kvcache.memory import bytes_per_token, make_allocator, slot_sizes
from nanochat_ray.engine.kvcache.paged_cache import PagedCache, gathered_attention
from nanochat_ray.engine.kvcache.paged_manager import PagedManager
from nanochat_ray.engine.kvcache.slot_cache import SlotCache
from nanochat_ray.engine.model import InferenceModel
from nanochat_ray.engine.request import Request, RequestOutput
from nanochat_ray.engine.runner import Runner
from nanochat_ray.model.gpt import GPT
from tests.engine.engine_kit import (
    PRESETS,
    VOCAB,
    answer,
    ask,
    finish,
    make_engine,
    make_model,
    tokens,
    uncached_greedy,
)

WINDOWED: dict[str, Any] = {"sequence_len": 320, "n_layer": 3, "window_pattern": "SSL"}
"""Two layers that see 128 tokens, and one that sees all."""


def paged_engine(model: GPT, **settings: Any) -> Engine:
    return make_engine(model, kv_layout="paged", **settings)


def allocator_of(engine: Engine) -> BlockAllocator:
    manager = engine.runner.kv_manager
    assert isinstance(manager, PagedManager)
    return manager.allocator


def block_tables_of(engine: Engine) -> list[BlockTables]:
    manager = engine.runner.kv_manager
    assert isinstance(manager, PagedManager)
    return [manager.block_tables(s) for s in engine.scheduler.running]


def requests(rng: random.Random, count: int, longest: int) -> list[Request]:
    """Greedy and seeded ones, of which some begin alike."""
    start = [rng.randrange(VOCAB) for _ in range(longest)]
    batch = []
    for i in range(count):
        prompt = start[: rng.randint(0, longest - 1)] if i % 2 else []
        prompt += [rng.randrange(VOCAB) for _ in range(rng.randint(1, longest - len(prompt)))]
        params: dict[str, Any] = {"max_tokens": rng.randint(1, 24), "seed": i}
        if i % 3:
            params |= {"temperature": 1.0, "top_p": 0.9, "frequency_penalty": 0.3}
        batch.append(ask(f"r{i}", prompt, **params))
    return batch


def run(
    engine: Engine, workload: list[Request], rng: random.Random, preempt: float = 0.0
) -> dict[str, list[int]]:
    results: dict[str, list[RequestOutput]] = {}
    coming = list(workload)
    while coming or engine.has_work:
        while coming and rng.random() < 0.6:
            engine.add(coming.pop(0))
        for output in engine.step():
            results.setdefault(output.request_id, []).append(output)
        engine.check_integrity()
        running = [s.request.id for s in engine.scheduler.running]
        if running and rng.random() < preempt:
            engine.preempt(rng.choice(running))
    return {name: tokens(outputs) for name, outputs in results.items()}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("heads", [2, 4])
def test_paged_equals_slots_and_uncached_greedy(preset: str, heads: int) -> None:
    model = make_model(preset, n_kv_head=heads)
    workload = requests(random.Random(1), 20, 90)
    slots = run(make_engine(model), workload, random.Random(2))
    assert run(paged_engine(model), workload, random.Random(3)) == slots
    ahead = {"num_speculative_tokens": 3, "speculative_disable_by_batch_size": 0}
    hard = paged_engine(model, max_num_seqs=6, max_num_batched_tokens=13, prefill_chunk=5, **ahead)
    assert run(hard, workload, random.Random(4), preempt=0.3) == slots
    assert hard.stats().preemptions > 10
    for request in workload:
        if request.params.temperature == 0:
            want = uncached_greedy(model, list(request.prompt), request.params.max_tokens)
            assert slots[request.id] == want


@pytest.mark.parametrize("preset", PRESETS)
def test_windowed_layers_free_old_blocks(preset: str) -> None:
    model = make_model(preset, **WINDOWED)
    workload = requests(random.Random(5), 8, 280)
    slots = run(make_engine(model), workload, random.Random(6))
    engine = paged_engine(model, max_num_batched_tokens=24, prefill_chunk=24)
    short, full = sorted(allocator_of(engine).pools, key=lambda pool: pool.capacity)
    assert (short.window, full.window) == (128, -1)
    # 128 tokens and a step, and not 320.
    assert short.capacity < 0.6 * full.capacity
    num_freed = 0

    def spy(chunks, previous_ids):  # type: ignore[no-untyped-def]
        nonlocal num_freed
        all_ids = [block_ids for tables in block_tables_of(engine) for block_ids in tables]
        num_freed = max(num_freed, *(block_ids.count(NULL_BLOCK) for block_ids in all_ids))
        return real(chunks, previous_ids)

    real, engine.runner.run = engine.runner.run, spy  # type: ignore[method-assign]
    assert run(engine, workload, random.Random(7), preempt=0.05) == slots
    assert num_freed > 5
    again = run(engine, workload, random.Random(8))
    assert again == slots
    assert engine.stats().num_hit_tokens > 100


def test_exhausted_blocks_preempt_the_last() -> None:
    model = make_model("modern")
    workload = [
        ask(f"r{i}", [i + 1] * (5 + i), max_tokens=100, priority=i % 3, temperature=0.7, seed=i)
        for i in range(8)
    ]
    slots = run(make_engine(model, max_num_seqs=8), workload, random.Random(1))
    small = paged_engine(model, max_num_seqs=8, kv_tokens=200, prefix_cache_tokens=0)
    assert [pool.capacity for pool in allocator_of(small).pools] == [200 // 16]
    for request in workload:
        small.add(request)
    ends: list[str] = []
    actual: dict[str, list[int]] = {}
    while small.has_work:
        for output in small.step():
            actual.setdefault(output.request_id, []).extend(output.tokens)
            ends += [output.request_id] if output.finish else []
        small.check_integrity()
        assert small.stats().kv_cache_usage <= 1
    assert actual == slots
    assert small.stats().preemptions > 2
    # In the order of priority, and of arrival within it.
    assert ends == [f"r{i}" for i in (0, 3, 6, 1, 4, 7, 2, 5)]
    assert all(pool.num_free_blocks == pool.capacity for pool in allocator_of(small).pools)


def test_urgent_request_preempts_for_blocks() -> None:
    model = make_model("classic")
    engine = paged_engine(model, kv_tokens=128, prefix_cache_tokens=0)
    engine.add(ask("later", [1] * 60, max_tokens=60, priority=5))
    for _ in range(6):
        engine.step()
    engine.add(ask("urgent", [2] * 100, max_tokens=5, priority=0))
    results = finish(engine)
    assert engine.stats().preemptions == 1
    assert list(results) == ["urgent", "later"]
    assert tokens(results["urgent"]) == uncached_greedy(model, [2] * 100, 5)


@pytest.mark.parametrize(("common", "steps"), [(0, 1), (15, 1), (16, 2), (64, 2)])
def test_prompts_with_a_common_prefix_wait_one_step(common: int, steps: int) -> None:
    """One of them computes its blocks of 16 tokens, which all others find in the next step."""
    engine = paged_engine(
        make_model("modern", n_embd=16, n_head=1, n_kv_head=1),
        max_num_seqs=32,
        max_num_batched_tokens=8192,
        async_scheduling="off",
    )
    for i in range(32):
        engine.add(ask(str(i), [*range(common), *[100 + i] * (80 - common)], max_tokens=1))
    ids: set[str] = set()
    for _ in range(steps):
        assert len(ids) < 32
        ids |= {output.request_id for output in engine.step()}
    assert len(ids) == 32
    assert engine.stats().num_hit_tokens == 31 * (common // 16 * 16)


def test_shared_prefix_is_not_copied() -> None:
    model, start = make_model("modern"), [7 + i for i in range(64)]
    engine = paged_engine(model, max_num_seqs=4)
    for i in range(4):
        engine.add(ask(f"r{i}", [*start, 100 + i], max_tokens=8))
    for _ in range(8):
        engine.step()
    all_ids = [block_ids for (block_ids,) in block_tables_of(engine)]
    assert len(all_ids) == 4
    assert all(block_ids[:4] == all_ids[0][:4] for block_ids in all_ids)
    assert len({block_ids[4] for block_ids in all_ids}) == 4
    pool = allocator_of(engine).pools[0]
    assert pool.capacity - pool.num_free_blocks == 4 + 4
    finish(engine)
    assert engine.stats().num_hit_tokens == 3 * 64
    off = paged_engine(model, prefix_cache_tokens=0)
    assert answer(off, ask("r0", [*start, 100], max_tokens=8)) == answer(
        engine, ask("again", [*start, 100], max_tokens=8)
    )
    assert engine.stats().num_hit_tokens == 4 * 64
    assert off.stats().num_hit_tokens == 0


def test_logprobs_do_not_depend_on_chunks() -> None:
    """Tokens are equal and log-probabilities near: how torch sums depends on the CPU, and on how
    many rows there are at a time."""
    model = make_model("modern", **WINDOWED)
    prompt = [random.Random(1).randrange(VOCAB) for _ in range(300)]
    answers = []
    for budget, company in ((310, 0), (40, 3), (7, 5)):
        engine = paged_engine(
            model, max_num_seqs=6, max_num_batched_tokens=budget, prefill_chunk=budget
        )
        for i in range(company):
            engine.add(ask(f"other{i}", prompt[i : 40 + 9 * i], max_tokens=60, logprobs=0))
        engine.add(ask("me", prompt, max_tokens=6, logprobs=3))
        answers.append(finish(engine)["me"])
    whole, *others = answers
    logprobs = torch.tensor([p.logprob for o in whole for p in o.logprobs or () if p])
    assert len(logprobs) == 6
    for other in others:
        assert tokens(other) == tokens(whole)
        near = torch.tensor([p.logprob for o in other for p in o.logprobs or () if p])
        torch.testing.assert_close(near, logprobs, atol=1e-4, rtol=0)


def test_padding_changes_nothing() -> None:
    model = make_model("modern", sequence_len=640)
    engine_config = EngineConfig(
        max_num_seqs=2, max_model_len=600, kv_layout="paged", prefix_cache_tokens=0
    )
    prompt = [random.Random(3).randrange(VOCAB) for _ in range(530)]
    with torch.inference_mode():
        want = model(torch.tensor([prompt]))[0]
    inference = InferenceModel(model.config, model.state_dict())
    for extra in (0, 13):
        blocks = make_allocator(model.config, engine_config, 600, torch.float32, 1 << 30)
        cache = PagedCache(model.config, blocks, 2, 600, torch.float32, torch.device("cpu"))
        tables = blocks.empty_tables()
        for start, count in ((0, 200), (200, 320), *((i, 1) for i in range(520, 530))):
            assert blocks.extend(tables, start, start + count)
            cache.set_block_tables(1, tables)
            spans = [Span(1, start, count, count == 1)]
            cache.use(cache.make_metadata(spans, count + extra))
            ids, before = torch.zeros((2, count + extra), dtype=torch.int64)
            ids[:count] = torch.tensor(prompt[start : start + count])
            before[:count] = torch.tensor([-1, *prompt][start : start + count])
            with torch.inference_mode():
                actual = inference.logits(inference.hidden(ids, before, cache))[:count]
            torch.testing.assert_close(actual, want[start : start + count], atol=3e-5, rtol=0)


def test_attention_gets_valid_metadata() -> None:
    """Shapes and dtypes that ``triton_attention.paged_attention`` documents."""
    calls = 0

    def spy(q, keys, values, tiles, block_table, **rest):  # type: ignore[no-untyped-def]
        nonlocal calls
        calls += 1
        (N, _, D), (pages, size, _, _) = q.shape, keys.shape
        assert q.stride()[1:] == (D, 1)
        assert values.shape == keys.shape
        assert keys.is_contiguous()
        assert values.is_contiguous()
        assert block_table.size(1) == -(-rest["max_seqlen_k"] // size)
        assert block_table.is_contiguous()
        assert {t.dtype for t in (tiles, block_table)} == {torch.int32}
        spans, firsts, counts, positions = tiles.T
        assert int(spans.max()) < len(block_table)
        assert sorted(zip(firsts.tolist(), (firsts + counts).tolist(), strict=True)) == list(
            pairwise([0, *sorted((firsts + counts).tolist())])
        )
        assert int((firsts + counts).max()) == N
        assert bool((counts[: rest["num_decodes"]] == 1).all())
        assert int((positions + counts).max()) <= rest["max_seqlen_k"]
        assert bool(((block_table >= 0) & (block_table < pages)).all())
        return gathered_attention(q, keys, values, tiles, block_table, **rest)

    model = make_model("modern", **WINDOWED)
    engine = paged_engine(model)
    assert isinstance(engine.runner.cache, PagedCache)
    engine.runner.cache._attention = spy
    run(engine, requests(random.Random(5), 6, 280), random.Random(7))
    assert calls > 100


def test_step_on_a_gpu_never_waits() -> None:
    """On tensors without values: reading one back, which a CUDA graph does not allow, fails."""
    dtype, device = torch.bfloat16, torch.device("meta")
    for preset in PRESETS:
        training_model = make_model(preset, **WINDOWED)
        weights = training_model.state_dict()
        model = InferenceModel(training_model.config, weights, dtype=dtype, device=device)
        config = EngineConfig(max_num_seqs=4)
        blocks = make_allocator(model.config, config, 320, dtype, 1 << 30)
        cache = PagedCache(model.config, blocks, 4, 320, dtype, device)
        cache._attention = lambda q, *rest, **keywords: torch.empty_like(q)
        for spans in ([Span(0, 7, 1, True), Span(2, 9, 60, False)], [Span(3, 0, 1, True)]):
            with torch.inference_mode():
                ids = torch.zeros(cache.prepare(spans), dtype=torch.int64, device=device)
                logits = model.logits(model.hidden(ids, ids, cache))
            assert logits.shape == (sum(span.num_tokens for span in spans), VOCAB)


def test_fp8_pages_take_a_quarter_of_float32() -> None:
    model = make_model("modern", **WINDOWED)
    prompt = [random.Random(1).randrange(VOCAB) for _ in range(200)]
    logprobs, sizes = [], []
    for kv_precision in ("auto", "fp8"):
        engine = paged_engine(model, kv_precision=kv_precision, kv_tokens=640)
        sizes.append(engine.runner.cache.nbytes)
        engine.add(ask("a", prompt, max_tokens=1, prompt_logprobs=0))
        entries = finish(engine)["a"][0].prompt_logprobs or []
        logprobs.append(torch.tensor([entry.logprob for entry in entries]))
    assert sizes[0] == 4 * sizes[1]
    error = (logprobs[1] - logprobs[0]).abs()
    # An attention's output is rounded by 2^-4 of a value at most, on average by far less.
    assert 0 < error.mean() < 2.0**-4
    with pytest.raises(ValueError, match=r"kv_precision='fp8' is not allowed: auto, or fp8 with"):
        make_engine(model, kv_layout="slots", kv_precision="fp8")


def test_cache_that_does_not_fit_is_rejected() -> None:
    model, dtype = make_model("modern").config, torch.float32
    config = EngineConfig(max_num_seqs=4, prefix_cache_tokens=0, kv_cache_memory_fraction=0.5)
    each = bytes_per_token(model, dtype, model.n_layer) * 128
    assert slot_sizes(model, config, 128, dtype, 2 * each).limit == each
    with pytest.raises(ValueError, match=r"max_model_len=128 .* keys and values of one sequence"):
        slot_sizes(model, config, 128, dtype, 2 * each - 2)
    assert slot_sizes(model, config, 128, dtype, 8 * each, grows=False).max_prefix_blocks == 0
    with pytest.raises(ValueError, match=r"max_num_seqs=4 .* max_model_len=128"):
        slot_sizes(model, config, 128, dtype, 7 * each, grows=False)
    plenty = make_allocator(model, config, 128, dtype, 1 << 30)
    assert [pool.capacity for pool in plenty.pools] == [4 * 8]
    scarce = make_allocator(model, config, 128, dtype, 3 * each)
    assert [pool.capacity for pool in scarce.pools] == [12]
    with pytest.raises(ValueError, match="max_model_len=128"):
        make_allocator(model, config, 128, dtype, each)
    small = dataclasses.replace(config, kv_tokens=100)
    with pytest.raises(ValueError, match=r"kv_tokens=100 .* max_model_len=128"):
        make_allocator(model, small, 128, dtype, 1 << 30)
    with pytest.raises(ValueError, match=r"max_model_len=10000000000 is not allowed"):
        make_engine(
            make_model("modern"),
            max_model_len=10_000_000_000,
            max_num_seqs=64,
            max_num_batched_tokens=65,
        )
    for field, value in (
        ("kv_layout", "pages"),
        ("kv_cache_memory_fraction", 0.0),
        ("kv_tokens", -1),
    ):
        with pytest.raises(ValueError, match=f"^{field}="):
            EngineConfig(**{field: value})  # type: ignore[arg-type]


def test_layout_depends_on_device() -> None:
    model = make_model("classic")
    cpu = torch.device("cpu")
    assert choose_layout(EngineConfig(), cpu) == "slots"
    assert choose_layout(EngineConfig(kv_layout="paged"), cpu) == "paged"
    assert isinstance(Runner(model, EngineConfig(), 128).cache, SlotCache)
    assert isinstance(Runner(model, EngineConfig(kv_layout="paged"), 128).cache, PagedCache)
    assert choose_layout(EngineConfig(), torch.device("cuda")) == "paged"
