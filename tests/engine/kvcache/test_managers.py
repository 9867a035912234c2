"""The contract of ``KVCacheManager``, which both layouts keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from nanochat_ray.engine.kvcache.base import (
    KVCacheManager,
    num_committable_tokens,
    num_matchable_tokens,
)
from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator, BlockTables
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE, BlockPool
from nanochat_ray.engine.kvcache.memory_budget import MemoryBudget
from nanochat_ray.engine.kvcache.paged_manager import PagedManager
from nanochat_ray.engine.kvcache.slot_manager import SlotManager
from nanochat_ray.engine.kvcache.slot_pages import SlotPages
from nanochat_ray.engine.request import Request, SamplingParams
from nanochat_ray.engine.sequence import Sequence as EngineSequence


class Memory:
    """Records what a manager does with it: copies of prefixes, and block tables."""

    def __init__(self) -> None:
        self.loads: list[tuple[list[int], int]] = []
        self.saves: list[tuple[int, list[tuple[int, int]]]] = []
        self.releases: list[int] = []
        self.tables: dict[int, list[int]] = {}

    def load(self, block_ids: Sequence[int], slot: int) -> None:
        self.loads.append((list(block_ids), slot))

    def save(self, slot: int, new_blocks: Sequence[tuple[int, int]]) -> None:
        self.saves.append((slot, list(new_blocks)))

    def release(self, block_id: int) -> None:
        self.releases.append(block_id)

    def set_block_tables(self, slot: int, tables: BlockTables) -> None:
        (self.tables[slot],) = (list(block_ids) for block_ids in tables)


def slot_manager(memory: Memory) -> KVCacheManager:
    return SlotManager(4, 128, memory, MemoryBudget(8 * BLOCK_SIZE))


def paged_manager(memory: Memory) -> KVCacheManager:
    return PagedManager(BlockAllocator([BlockPool(8)], max_step_tokens=128), memory)


Make = Callable[[Memory], KVCacheManager]
managers = pytest.mark.parametrize("make", [slot_manager, paged_manager])


def sequence(slot: int, length: int, scope: str = "", first: int = 0) -> EngineSequence:
    tokens = [first, *range(1, length)]
    request = Request(id=str(slot), prompt=tokens, cache_scope=scope)
    return EngineSequence(
        request, list(tokens), seed=0, max_length=128, prefill_spans=[(0, length)], slot=slot
    )


def compute(manager: KVCacheManager, s: EngineSequence) -> None:
    """The whole prompt in one step."""
    assert manager.allocate(s, s.num_tokens)
    s.num_computed_tokens = s.num_tokens
    manager.commit(s)


@managers
def test_committed_prefix_is_matched(make: Make) -> None:
    manager = make(Memory())
    a, b = sequence(0, 40), sequence(1, 40)
    assert manager.match_prefix(a) == 0
    compute(manager, a)
    assert manager.match_prefix(b) == 2 * BLOCK_SIZE  # 40 tokens have two full blocks
    assert (manager.num_lookup_tokens, manager.num_hit_tokens) == (39 + 39, 32)
    manager.check_integrity([a, b])


@managers
def test_last_token_is_never_matched(make: Make) -> None:
    manager = make(Memory())
    compute(manager, sequence(0, 32))
    assert manager.match_prefix(sequence(1, 32)) == BLOCK_SIZE  # its logits are needed


@managers
def test_only_computed_prompt_tokens_are_committed(make: Make) -> None:
    manager = make(Memory())
    a = sequence(0, 20)
    a.tokens += range(20, 60)  # output
    assert manager.allocate(a, 60)
    a.num_computed_tokens = 60
    manager.commit(a)
    longer = sequence(1, 60)
    assert manager.match_prefix(longer) == BLOCK_SIZE
    other = sequence(2, 60, first=9)
    assert manager.allocate(other, 40)
    other.num_computed_tokens = 40
    manager.commit(other)
    assert manager.match_prefix(sequence(3, 60, first=9)) == 2 * BLOCK_SIZE


@managers
def test_scopes_and_missing_logprobs_match_nothing(make: Make) -> None:
    manager = make(Memory())
    compute(manager, sequence(0, 40, scope="alice"))
    assert manager.match_prefix(sequence(1, 40, scope="bob")) == 0
    needs_logprobs = sequence(1, 40, scope="alice")
    needs_logprobs.prompt_logprobs = []
    assert manager.match_prefix(needs_logprobs) == 0


@managers
def test_free_twice_and_reset_leave_no_references(make: Make) -> None:
    manager = make(Memory())
    a = sequence(0, 40)
    compute(manager, a)
    manager.free(a)
    manager.free(a)
    manager.check_integrity([])
    b = sequence(1, 40)
    assert manager.match_prefix(b) == 2 * BLOCK_SIZE  # still cached
    manager.free(b)
    manager.reset_prefix_cache()
    manager.check_integrity([])
    assert manager.match_prefix(sequence(2, 40)) == 0


def test_slots_have_memory_of_their_own() -> None:
    manager = SlotManager(num_slots=2, max_model_len=100)
    a, b = sequence(0, 40), sequence(1, 40)
    a.num_computed_tokens, b.num_computed_tokens = 40, 10
    assert manager.usage([a, b]) == 50 / 200
    assert manager.usage([]) == 0
    assert manager.can_admit(a, [b])
    assert manager.allocate(a, 100)
    assert manager.frees_memory(a)
    assert not manager.caches_prefixes
    manager.commit(a)
    assert manager.match_prefix(b) == 0
    assert (manager.num_lookup_tokens, manager.num_hit_tokens) == (0, 0)


@managers
def test_figures_of_both_layouts(make: Make) -> None:
    manager = make(Memory())
    assert manager.caches_prefixes
    a = sequence(0, 40)
    compute(manager, a)
    assert manager.frees_memory(a)
    assert manager.usage([a]) == (3 / 8 if make is paged_manager else 40 / 512)


def test_without_a_prefix_cache_nothing_is_matched() -> None:
    manager = PagedManager(BlockAllocator([BlockPool(8)]), Memory(), caches_prefixes=False)
    compute(manager, sequence(0, 40))
    assert not manager.caches_prefixes
    assert manager.match_prefix(sequence(1, 40)) == 0
    assert not manager.frees_memory(sequence(1, 40))


def test_a_second_match_replaces_the_first() -> None:
    manager = paged_manager(Memory())
    compute(manager, a := sequence(0, 40))
    manager.free(a)
    b = sequence(1, 40)
    for _ in range(2):  # it was matched, and preempted before it ran
        assert manager.match_prefix(b) == 2 * BLOCK_SIZE
        manager.check_integrity([b])


def test_slots_copy_prefixes() -> None:
    memory = Memory()
    manager = slot_manager(memory)
    compute(manager, sequence(0, 40))
    assert [(slot, [i for i, _ in blocks]) for slot, blocks in memory.saves] == [(0, [0, 1])]
    manager.match_prefix(sequence(3, 40))
    assert memory.loads == [([block_id for _, block_id in memory.saves[0][1]], 3)]


def test_slots_take_memory_of_oldest_prefixes() -> None:
    memory = Memory()
    pages = SlotPages(4, 128, 1, 1, MemoryBudget(128))
    manager = SlotManager(4, 128, memory, MemoryBudget(64), pages)
    a, b = sequence(0, 33, first=1), sequence(1, 17, first=2)
    for s in (a, b):
        compute(manager, s)  # 50 bytes in slots, 48 in prefixes
    manager.free(a)
    manager.check_integrity([b])
    assert manager.match_prefix(sequence(2, 17, first=2)) == BLOCK_SIZE
    manager.check_integrity([b, sequence(2, 17)])
    c = sequence(3, 100)
    assert not manager.can_admit(c, [b, sequence(2, 17)])
    assert not manager.allocate(c, 100)  # 33 bytes are in use by b and its copy
    assert len(memory.releases) == 3
    assert manager.allocate(c, 95)
    manager.check_integrity([b, sequence(2, 17), c])


def test_prefix_cache_has_a_limit_of_its_own() -> None:
    memory = Memory()
    manager = SlotManager(4, 128, memory, MemoryBudget(2 * BLOCK_SIZE))
    compute(manager, sequence(0, 100, first=1))
    assert [len(blocks) for _, blocks in memory.saves] == [2]
    compute(manager, sequence(1, 20, first=2))  # evicts the end of the first
    assert manager.match_prefix(sequence(2, 100, first=1)) == BLOCK_SIZE
    assert manager.match_prefix(sequence(3, 20, first=2)) == BLOCK_SIZE


def test_paged_sequences_share_blocks_until_exhausted() -> None:
    memory = Memory()
    manager = paged_manager(memory)
    a, b = sequence(0, 64), sequence(1, 64)
    compute(manager, a)
    assert manager.usage([a]) == 0.5
    b.num_computed_tokens = manager.match_prefix(b)
    assert manager.allocate(b, 64)
    assert memory.tables[1][:3] == memory.tables[0][:3]
    assert memory.tables[1][3] != memory.tables[0][3]
    assert manager.usage([a, b]) == 5 / 8
    assert not manager.can_admit(sequence(2, 64, first=9), [a, b])  # 4 blocks + 1, 3 are free
    assert manager.can_admit(sequence(2, 47, first=9), [a, b])
    assert not manager.allocate(b, 128)  # needs 4 more
    assert len(memory.tables[1]) == 4
    manager.free(a)
    assert manager.allocate(b, 80)
    manager.check_integrity([b])
    with pytest.raises(AssertionError):
        manager.check_integrity([])


@pytest.mark.parametrize(
    ("num_output", "first_logprob", "matchable", "with_output"),
    [
        (0, None, 9, 9),  # of ten tokens the last one's logits are needed
        (3, None, 10, 12),
        (0, 5, 4, 4),  # the token at 5 has the logits of the one at 4
        (3, 5, 4, 4),
        (3, 10, 10, 12),  # no token of the prompt is scored
    ],
)
def test_tokens_that_may_come_from_a_cache(
    num_output: int, first_logprob: int | None, matchable: int, with_output: int
) -> None:
    s = sequence(0, 10)
    s.tokens += range(num_output)
    if first_logprob is not None:
        params = SamplingParams(prompt_logprobs=0, prompt_logprobs_start=first_logprob)
        s.request = dataclasses.replace(s.request, params=params)
        s.prompt_logprobs = []
    assert num_matchable_tokens(s) == matchable
    assert num_matchable_tokens(s, with_output=True) == with_output
    for s.num_computed_tokens, count in ((4, 4), (10, 10), (12, 10)):
        assert num_committable_tokens(s) == count


def test_paged_memory_is_asked_for_when_a_block_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not for each token: a decode of 256 sequences would ask 256 times a step."""
    manager = paged_manager(Memory())
    assert isinstance(manager, PagedManager)
    ends: list[int] = []
    extend = manager.allocator.extend

    def record(tables: BlockTables, start: int, end: int) -> bool:
        ends.append(end)
        return extend(tables, start, end)

    monkeypatch.setattr(manager.allocator, "extend", record)
    s = sequence(0, 1)
    for num_tokens in range(1, 2 * BLOCK_SIZE + 1):
        assert manager.allocate(s, num_tokens)
    assert ends == [1, BLOCK_SIZE + 1]
    assert len(manager.block_tables(s)[0]) == 2
