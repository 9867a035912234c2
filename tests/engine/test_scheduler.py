"""Who runs next, without a model."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nanochat_ray.engine.draft import PromptLookup
from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator, BlockTables
from nanochat_ray.engine.kvcache.block_pool import BlockPool
from nanochat_ray.engine.kvcache.paged_manager import PagedManager
from nanochat_ray.engine.kvcache.slot_manager import SlotManager
from nanochat_ray.engine.prefill_cost import PrefillCostModel
from nanochat_ray.engine.request import EngineFull, Request, SamplingParams
from nanochat_ray.engine.scheduler import Scheduler
from nanochat_ray.engine.sequence import Sequence


def sequence(name: str, length: int = 4, **fields: object) -> Sequence:
    request = Request(id=name, prompt=[1] * length, **fields)  # type: ignore[arg-type]
    return Sequence(request, [1] * length, seed=0, max_length=99, prefill_spans=[(0, length)])


def scheduler(**fields: Any) -> Scheduler:
    settings: dict[str, Any] = {
        "num_slots": 2,
        "max_num_batched_tokens": 10,
        "prefill_chunk": 4,
        "max_queue_size": 9,
    } | fields
    return Scheduler(SlotManager(settings["num_slots"], 99), **settings)


class NoTables:
    """Attention without a device."""

    def set_block_tables(self, slot: int, tables: BlockTables) -> None:
        assert slot >= 0


def run(s: Scheduler) -> dict[str, int]:
    """One step: tokens by request; whoever is done with its prompt gets one more token."""
    chunks = s.plan().chunks
    for chunk in chunks:
        chunk.sequence.num_computed_tokens = chunk.end
        if chunk.samples:
            chunk.sequence.tokens.append(1)
    s.check_integrity()
    return {chunk.sequence.request.id: chunk.num_tokens for chunk in chunks}


@pytest.mark.parametrize(
    ("num_tokens", "limit", "batches"),
    [(0, 0, []), (0, 3, []), (1, 0, [1, 2, 3, 4]), (1, 3, [1, 2]), (5, 1, [])],
)
def test_small_batches_speculate(num_tokens: int, limit: int, batches: list[int]) -> None:
    """``batches``: the numbers of decodes that have room for draft tokens; a limit of 0 is none."""
    s = scheduler(num_speculative_tokens=num_tokens, speculative_disable_by_batch_size=limit)
    assert [size for size in range(1, 5) if s.can_speculate(size)] == batches


def test_decodes_come_before_long_prompts() -> None:
    s = scheduler()
    s.add(sequence("short"))
    assert run(s) == {"short": 4}
    s.add(sequence("long", 30))
    assert run(s) == {"short": 1, "long": 4}
    s.remove(s.running[0])
    assert run(s) == {"long": 10}  # no decode waits: the whole budget


def test_chunks_shrink_late_in_a_long_prompt() -> None:
    s = scheduler(
        max_num_batched_tokens=20,
        prefill_chunk=8,
        prefill_cost=PrefillCostModel(doubling_tokens=16),
    )
    s.add(sequence("short"))
    run(s)
    s.add(sequence("long", 60))
    counts = [run(s)["long"] for _ in range(12)]
    assert counts == [8, 5, 4, 3, 3, 3, 3, 2, 2, 2, 2, 2]
    s.remove(s.running[0])
    assert run(s) == {"long": 20}


def test_prompt_budget_grows_with_decodes() -> None:
    s = scheduler(
        num_slots=5,
        max_num_batched_tokens=20,
        prefill_chunk=6,
        prefill_cost=PrefillCostModel(tokens_per_decode=3),
    )
    counts = []
    for name in "abcd":
        s.add(sequence(name))
        run(s)
        s.add(sequence("long", 40))
        counts.append(run(s)["long"])
        s.remove(s.running[-1])
    assert counts == [6, 6, 9, 12]


def test_prompt_budget_grows_with_prompts() -> None:
    s = scheduler(num_slots=9, max_num_batched_tokens=40)
    s.add(sequence("first"))
    run(s)
    for name in "abcd":
        s.add(sequence(name, 13))
    assert run(s) == {"first": 1, "a": 13, "b": 3}  # 4 prompts: 4 times 4 tokens
    assert run(s) == {"first": 1, "a": 1, "b": 10, "c": 2}  # 3
    assert run(s) == {"first": 1, "a": 1, "b": 1, "c": 8}  # 2
    assert run(s) == {"first": 1, "a": 1, "b": 1, "c": 3, "d": 5}  # 2
    assert run(s) == {"first": 1, "a": 1, "b": 1, "c": 1, "d": 4}  # 1


def test_short_prompts_run_in_one_step() -> None:
    s = scheduler(num_slots=9, max_num_batched_tokens=40)
    s.add(sequence("first"))
    run(s)
    for name, length in (("a", 12), ("b", 13), ("c", 5)):  # up to 3 times 4 are short
        s.add(sequence(name, length))
    assert run(s) == {"first": 1, "a": 12, "b": 9}  # 12 + 4 + 5
    assert run(s) == {"first": 1, "a": 1, "b": 4, "c": 5}
    s.add(sequence("prefix", 40))
    s.waiting[-1].num_cached_tokens = s.waiting[-1].num_computed_tokens = 29
    assert run(s)["prefix"] == 11


def test_several_prompts_share_a_step() -> None:
    s = scheduler(num_slots=3)
    for name in "abc":
        s.add(sequence(name))
    assert run(s) == {"a": 4, "b": 4, "c": 2}


def test_lower_priority_number_preempts() -> None:
    s = scheduler(num_slots=1)
    s.add(sequence("later", priority=5))
    assert run(s) == {"later": 4}
    s.add(sequence("same", priority=5))
    assert run(s) == {"later": 1}
    s.add(sequence("urgent", priority=1))
    assert run(s) == {"urgent": 4}
    assert s.num_preemptions == 1
    s.remove(s.running[0])
    # All of it again, before "same", which came after it: the prompt as a prompt, and what was
    # decoded as decodes, to the same bits.
    assert run(s) == {"later": 4}
    (chunk,) = s.plan().chunks
    assert (chunk.start, chunk.num_tokens, chunk.is_decode) == (4, 2, True)


def test_a_queue_is_full() -> None:
    """Two wait, beside those for which a slot is free."""
    s = scheduler(num_slots=1, max_queue_size=2)
    capacities = []
    for name in "abc":
        capacities.append(s.queue_capacity)
        s.add(sequence(name))
    assert capacities == [3, 2, 1]
    with pytest.raises(EngineFull, match="max_queue_size=2"):
        s.add(sequence("d"))
    run(s)
    assert s.queue_capacity == 0
    s.remove(s.running[0])
    assert s.queue_capacity == 1


def test_clients_take_turns() -> None:
    s = scheduler(num_slots=2)
    for i in range(4):
        s.add(sequence(f"many{i}", client="many"))
    s.add(sequence("one", client="one"))
    assert set(run(s)) == {"many0", "one"}


def test_clients_take_turns_in_admission_order() -> None:
    s = scheduler(num_slots=1)
    for name, client in [*((f"many{i}", "many") for i in range(3)), ("a", "a"), ("b", "b")]:
        s.add(sequence(name, client=client))
    s.add(sequence("urgent", priority=-1, client="many"))
    order = []
    while s.waiting or s.running:
        order += run(s)
        s.remove(s.running[0])
    assert order == ["urgent", "a", "b", "many0", "many1", "many2"]
    assert s.plan().chunks == []
    for name in ("many3", "many4", "c"):
        s.add(sequence(name, client=name.rstrip("0123456789")))
    assert list(run(s)) == ["many3"]  # the queue was empty: the order is reset


def test_the_client_with_fewer_running_goes_first() -> None:
    """Also if it was the last one to be admitted."""
    s = scheduler(num_slots=3, max_num_batched_tokens=20)

    def replace(name: str | None, *names: str) -> set[str]:
        for q in [q for q in s.running if q.request.id == name]:
            s.remove(q)
        for new in names:
            s.add(sequence(new, client=new[:-1]))
        return set(run(s))

    s.add(sequence("later", priority=9))  # while a request waits, the order is kept
    assert replace(None, "many0", "many1", "x0") == {"many0", "many1", "x0"}
    assert replace("x0", "one0") == {"many0", "many1", "one0"}
    assert replace("one0", "many2", "one1") == {"many0", "many1", "one1"}


def test_youngest_of_lowest_priority_is_preempted() -> None:
    s = scheduler(num_slots=3, max_num_batched_tokens=20)
    for name, priority in (("old", 5), ("young", 5), ("kept", 2)):
        s.add(sequence(name, priority=priority))
    run(s)
    s.add(sequence("urgent", priority=0))
    run(s)
    assert {q.request.id for q in s.running} == {"old", "kept", "urgent"}


def test_the_last_one_waits_with_its_memory() -> None:
    """Three blocks of 16 tokens: only an older sequence takes the memory of a younger one."""
    allocator = BlockAllocator([BlockPool(3)])
    manager = PagedManager(allocator, NoTables(), caches_prefixes=False)
    s = Scheduler(
        manager, num_slots=2, max_num_batched_tokens=64, prefill_chunk=64, max_queue_size=9
    )
    for name in "ab":
        s.add(sequence(name, 16))
    assert run(s) == {"a": 16, "b": 16}
    for _ in range(16):  # into the third block, which both need
        assert run(s) == {"a": 1}
        assert (s.running[1].num_computed_tokens, s.num_preemptions) == (16, 0)
    assert run(s) == {"a": 1}
    assert (s.num_preemptions, [q.request.id for q in s.waiting]) == (1, ["b"])
    s.remove(s.running[0])
    assert run(s) == {"b": 16}


@pytest.mark.parametrize(
    ("scope", "length", "first_step"),
    [
        ("x", 32, {"a": 32}),  # b waits a step to match the first block
        ("y", 32, {"a": 32, "b": 32}),
        ("x", 15, {"a": 32, "b": 15}),  # no full block
    ],
)
def test_an_equal_prompt_waits_for_its_prefix(
    scope: str, length: int, first_step: dict[str, int]
) -> None:
    allocator = BlockAllocator([BlockPool(9)])
    manager = PagedManager(allocator, NoTables(), caches_prefixes=True)
    s = Scheduler(
        manager, num_slots=2, max_num_batched_tokens=64, prefill_chunk=64, max_queue_size=9
    )
    s.add(sequence("a", 32, cache_scope="x"))
    s.add(sequence("b", length, cache_scope=scope))
    assert run(s) == first_step


def test_a_scored_prompt_waits_for_no_prefix() -> None:
    """The logits of all its tokens are needed, so that none may come from the cache."""
    manager = PagedManager(BlockAllocator([BlockPool(9)]), NoTables(), caches_prefixes=True)
    s = Scheduler(
        manager, num_slots=2, max_num_batched_tokens=64, prefill_chunk=64, max_queue_size=9
    )
    s.add(sequence("a", 32))
    s.add(sequence("b", 32, params=SamplingParams(prompt_logprobs=0)))
    s.waiting[-1].prompt_logprobs = []
    assert run(s) == {"a": 32, "b": 32}


def test_expire_removes_waiting_and_running() -> None:
    s = scheduler(num_slots=1)
    for name, deadline in (("runs", 5.0), ("waits", 4.0), ("later", 9.0), ("never", None)):
        s.add(sequence(name, deadline=deadline))
    run(s)
    assert s.expire(3.9) == []
    assert [q.request.id for q in s.expire(5.0)] == ["runs", "waits"]
    s.check_integrity()
    assert list(run(s)) == ["later"]


def test_draft_fits_budget_and_max_length() -> None:
    s = scheduler(num_slots=4, max_num_batched_tokens=12, num_speculative_tokens=5)
    for name in "abc":
        s.add(sequence(name, 4))
        s.waiting[-1].prompt_lookup = PromptLookup(1)  # all tokens are 1, so it always proposes
    while any(not q.is_decoding for q in s.running) or s.waiting:
        run(s)
    s.running[1].max_length = len(s.running[1].tokens) + 3
    s.add(sequence("d", 13))
    assert [(c.sequence.request.id, c.num_tokens, len(c.draft)) for c in s.plan().chunks] == [
        ("a", 1, 5),
        ("b", 1, 0),
        ("c", 1, 0),
        ("d", 4, 0),
    ]
    s.remove(s.running[0])
    assert [(len(c.draft), c.num_logits) for c in s.plan().chunks] == [(2, 3), (4, 5), (0, 0)]


@pytest.mark.parametrize("fields", [{"max_num_batched_tokens": 3},
                                    {"speculative_disable_by_batch_size": 3}])  # fmt: skip
def test_one_free_token_is_one_draft_token(fields: dict[str, int]) -> None:
    s = scheduler(num_speculative_tokens=5, **fields)
    for name in "ab":
        s.add(sequence(name))
        s.waiting[-1].prompt_lookup = PromptLookup(1)
    while s.has_prompts:
        run(s)
    assert [len(c.draft) for c in s.plan().chunks] == [1, 0]


def test_long_prompt_delays_no_decode() -> None:
    s = scheduler(num_slots=17, max_num_batched_tokens=256, prefill_chunk=64)
    for i in range(16):
        s.add(sequence(f"decode{i}"))
    run(s)
    s.add(sequence("long", 1900))
    steps = 0
    while s.running[-1].num_computed_tokens < 1900:
        ran = run(s)
        steps += 1
        # Each of them gets its token in each step, which is at most so much longer.
        assert all(ran[f"decode{i}"] == 1 for i in range(16))
        assert 0 < ran["long"] <= 64
    assert steps == 30  # 1900 / 64: and the prompt is not starved


@pytest.mark.slow
def test_all_finish_with_blocks_for_one_sequence() -> None:
    rng, preemptions = random.Random(0), 0
    for trial in range(40):
        window = rng.choice([-1, 20])
        # 128 tokens: all of one sequence; of layers with a window 20, and a step of 10.
        pools = [BlockPool(8 + trial % 5), BlockPool(3 + trial % 5 if window > 0 else 8, window)]
        allocator = BlockAllocator(pools, max_step_tokens=10)
        s = Scheduler(
            PagedManager(allocator, NoTables(), caches_prefixes=False),
            num_slots=5,
            max_num_batched_tokens=10,
            prefill_chunk=rng.choice([2, 10]),
            max_queue_size=99,
            num_speculative_tokens=2,
        )
        for i in range(12):
            q = sequence(f"{i}", rng.randint(1, 90), priority=rng.randint(0, 2))
            q.max_length = 128
            q.prompt_lookup = PromptLookup(1)
            s.add(q)
        steps = 0
        while s.running or s.waiting:
            assert run(s)  # somebody gets on in every step
            for q in [q for q in s.running if len(q.tokens) >= q.max_length]:
                s.remove(q)
            steps += 1
            assert steps < 20_000
        preemptions += s.num_preemptions
        assert all(pool.num_free_blocks == pool.capacity for pool in pools)
    assert preemptions > 100
