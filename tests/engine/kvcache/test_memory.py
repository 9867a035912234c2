"""Memory of slots: committed as it is written, within a budget, and given back."""

from __future__ import annotations

import platform
import sys

import psutil
import pytest
import torch

from nanochat_ray.engine import runner
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.engine.engine import Engine
from nanochat_ray.engine.kvcache import build, prefix_store
from nanochat_ray.engine.kvcache.lazy_memory import LazyMemory, page_tokens
from nanochat_ray.engine.kvcache.memory import bytes_per_token, max_prefix_tokens
from nanochat_ray.engine.kvcache.memory_budget import STEP, MemoryBudget
from nanochat_ray.engine.kvcache.prefix_store import PrefixStore
from nanochat_ray.engine.kvcache.slot_cache import SlotCache
from nanochat_ray.engine.kvcache.slot_manager import SlotManager
from nanochat_ray.engine.kvcache.slot_pages import SlotPages
from nanochat_ray.model.gpt import GPT
from tests.engine.engine_kit import (
    answer,
    ask,
    finish,
    make_engine,
    make_model,
    needs_compiler,
    tokens,
)

GIB = 1 << 30


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def budget_of(engine: Engine) -> MemoryBudget:
    manager = engine.runner.kv_manager
    assert isinstance(manager, SlotManager)
    return manager.budget


@pytest.mark.parametrize("huge_pages", [False, True])
def test_memory_is_committed_when_written(huge_pages: bool) -> None:
    before = resident()
    memory = LazyMemory((64 * GIB // 4,), torch.float32, huge_pages)
    assert float(memory.tensor[:: GIB // 16].sum()) == 0
    assert resident() - before < 64 << 20
    half = 32 << 20
    memory.tensor[: 2 * half // 4] = 1
    assert resident() - before > half
    memory.release(0, half + 100)  # the last page has another owner
    assert (memory.tensor[: half // 4].sum(), memory.tensor[half // 4]) == (0, 1)
    assert resident() - before < half + (8 << 20)
    with pytest.raises(ValueError, match=r"GiB of address space .* lower max_num_seqs"):
        LazyMemory((1 << 60,), torch.float32, huge_pages)


def kernel_version() -> tuple[int, ...]:
    numbers = platform.release().split("-")[0].split(".")
    return tuple(int(n) for n in numbers if n.isdigit()) if sys.platform == "linux" else ()


@pytest.mark.skipif(kernel_version() < (5, 14), reason="needs Linux 5.14")
def test_memory_is_committed_ahead() -> None:
    memory = LazyMemory((64 << 20,), torch.uint8, huge_pages=False)
    memory.tensor[:5] = 7
    before = resident()
    memory.commit(0, 32 << 20).join()
    assert 24 << 20 < resident() - before < 48 << 20
    memory.commit(60 << 20, 32 << 20).join()  # no further than its end
    assert memory.tensor[:8].tolist() == [7] * 5 + [0] * 3


def test_blocks_are_committed_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are in use, at most three at a time."""
    device = torch.device("cpu")
    cache = SlotCache(make_model("classic").config, 2, 128, torch.float32, device)
    store = PrefixStore(cache, 40)
    block_bytes = 16 * 2 * cache.keys[:, 0, :, 0].nbytes
    monkeypatch.setattr(prefix_store, "COMMIT_BYTES", 3 * block_bytes - 1)
    ranges: list[tuple[int, int]] = []
    monkeypatch.setattr(LazyMemory, "commit", lambda self, *range_: ranges.append(range_))
    for new_blocks in (
        [(0, 0), (1, 1)],
        [(2, 2)],
        [(0, 3)],
        [(1, 4)],
        [(2, 5)],
        [(3, 20)],
        [(0, 4)],
    ):
        store.save(0, new_blocks)
    want = [(2, 2), (4, 3), (7, 3), (21, 3)]
    assert ranges == [(first * block_bytes, count * block_bytes) for first, count in want]


def test_pages_hold_whole_tokens() -> None:
    assert page_tokens(64 * 4, huge_pages=False) == 16
    assert page_tokens(128 * 2, huge_pages=True) == 8192
    assert page_tokens(1 << 30, huge_pages=False) == 1


def test_budget_asks_the_machine_once_a_step() -> None:
    free, questions = [10 * STEP], 0

    def free_memory() -> int:
        nonlocal questions
        questions += 1
        return free[0]

    budget = MemoryBudget(4 * STEP, reserve=STEP, free_memory=free_memory)
    assert not budget.take(4 * STEP + 1)
    assert questions == 0
    for _ in range(8):
        assert budget.take(STEP // 8)
    assert questions == 1
    free[0] = STEP + 100  # others took the rest
    assert not budget.take(101)
    assert budget.take(100)
    assert (budget.num_bytes, questions) == (STEP + 100, 2)
    budget.give_back(200)
    free[0] = STEP
    assert not budget.take(1)
    assert budget.can_hold(budget.num_bytes)


def test_slots_keep_pages_until_needed() -> None:
    releases: list[int] = []
    pages = SlotPages(3, 100, 10, 16, MemoryBudget(1500), releases.append)
    assert pages.commit(0, 17) == pages.commit(0, 32) == 0
    assert pages.budget.num_bytes == 320
    assert pages.commit(1, 99) == 0
    assert pages.budget.num_bytes == 1320  # no more than the slot has
    assert pages.commit(2, 33) == 480  # is missing
    assert not pages.release_idle()
    pages.free(1)
    assert pages.commit(1, 50) == 0  # still there
    pages.free(1)
    assert pages.release_idle()
    assert (releases, pages.budget.num_bytes) == ([1], 320)
    assert pages.commit(2, 33) == 0
    pages.check_integrity({0, 2}, 0)
    with pytest.raises(AssertionError):
        pages.check_integrity({0}, 0)


def test_prefix_cache_is_sized_from_memory() -> None:
    config = EngineConfig(max_num_seqs=4, prefix_cache_tokens=None)
    assert max_prefix_tokens(config, 100, 1 << 20, 1 << 10) == 512
    assert max_prefix_tokens(config, 100, 1 << 40, 1 << 10) == 16 * 4 * 100
    explicit = EngineConfig(prefix_cache_tokens=7)
    assert max_prefix_tokens(explicit, 100, 1 << 20, 1 << 10) == 7
    with pytest.raises(ValueError, match="prefix_cache_tokens=-1"):
        EngineConfig(prefix_cache_tokens=-1)


def tokens_to_bytes(model: GPT, num_tokens: int) -> int:
    return num_tokens * bytes_per_token(model.config, torch.float32, model.config.n_layer)


@pytest.mark.parametrize("prefix_cache_tokens", [0, 64])
def test_scarce_memory_changes_no_token(
    prefix_cache_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences wait, are preempted and lose their prefixes, and get the same tokens."""
    model = make_model("modern")
    workload = [ask(str(i), [i + 1] * (5 + 9 * i), max_tokens=40) for i in range(8)]
    results = []
    for num_tokens in (10_000, 210):
        free = tokens_to_bytes(model, num_tokens)
        monkeypatch.setattr(build, "free_memory", lambda device, free=free, **_: free)
        config = {"prefix_cache_tokens": prefix_cache_tokens, "kv_cache_memory_fraction": 0.95}
        engine = make_engine(model, **config)
        for request in workload:
            engine.add(request)
        results.append({k: tokens(v) for k, v in finish(engine).items()})
        assert budget_of(engine).num_bytes <= 0.95 * free
        assert (engine.stats().preemptions > 0) == (num_tokens == 210)
    assert results[0] == results[1]


def test_request_without_memory_fails_with_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes have taken the memory since the engine started."""
    model = make_model("modern")
    start, later = tokens_to_bytes(model, 200), tokens_to_bytes(model, 110)
    monkeypatch.setattr(build, "free_memory", lambda device, **_: start)
    engine = make_engine(model)
    # A fifth of what was free at the start is left to others.
    monkeypatch.setattr(build, "free_memory", lambda device: later - budget_of(engine).num_bytes)
    for name, length in (("long", 80), ("short", 30)):
        engine.add(ask(name, [5] * length))
    results = finish(engine)
    assert results["long"][-1].finish == "error"
    assert "memory: the machine has none left" in (results["long"][-1].error or "")
    assert len(tokens(results["short"])) == 16


def test_request_without_memory_leaves_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the first in the step that admits it. The row behind the slots is greedy."""
    model = make_model("modern")
    monkeypatch.setattr(build, "free_memory", lambda device, **_: tokens_to_bytes(model, 200))
    engine = make_engine(model)
    monkeypatch.setattr(build, "free_memory", lambda device: 0)
    engine.add(ask("r", [1, 2], temperature=1.0))
    (output,) = engine.step()
    assert output.finish == "error"
    assert engine._sampling._parameters.temperature.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


@needs_compiler  # with torch's attention an answer is not a prefix
def test_second_round_finds_its_prefix() -> None:
    """16 conversations whose second prompt is the first, its answer and a few tokens more."""
    model = make_model("modern", sequence_len=512)
    engine = make_engine(model, max_num_batched_tokens=256, prefill_chunk=64)
    prompts = {str(i): [i + 1, *range(20, 270)] for i in range(16)}
    for name, prompt in prompts.items():
        engine.add(ask(name, prompt, max_tokens=150, ignore_eos=True))
    answers = {name: tokens(outputs) for name, outputs in finish(engine).items()}
    for name, prompt in prompts.items():
        engine.add(ask(name, [*prompt, *answers[name], 7, 8, 9], max_tokens=5))
    second = finish(engine)
    num_hits = [second[name][0].cached_tokens for name in prompts]
    assert min(num_hits) >= 0.9 * (251 + 150)
    no_cache = make_engine(model, prefix_cache_tokens=0, max_num_batched_tokens=256)
    request = ask("3", [*prompts["3"], *answers["3"], 7, 8, 9], max_tokens=5)
    assert answer(no_cache, request) == tokens(second["3"])


@needs_compiler
@pytest.mark.parametrize(("kernels", "has_native"), [("auto", True), ("torch", False)])
def test_the_early_check_knows_the_kernels(
    kernels: str, has_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(runner, "check_kv_cache", lambda *args: calls.append(args[-1]))
    make_engine(make_model("modern"), kernels=kernels)
    assert calls == [has_native]
