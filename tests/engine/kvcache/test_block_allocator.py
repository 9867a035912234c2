"""Block tables and prefix matching, against a record of what every block contains."""

from __future__ import annotations

import random

import pytest

from nanochat_ray.engine.kvcache.block_allocator import BlockAllocator, BlockTables
from nanochat_ray.engine.kvcache.block_pool import BLOCK_SIZE, NULL_BLOCK, BlockPool


def one_pool(capacity: int) -> BlockAllocator:
    return BlockAllocator([BlockPool(capacity)])


def match(allocator: BlockAllocator, tokens: list[int], limit: int) -> list[int]:
    """Looks without holding, as the slots do."""
    tables = allocator.match_prefix(tokens, limit)
    allocator.free(tables)
    return tables[0]


def test_match_prefix_stops_at_first_difference() -> None:
    allocator = one_pool(10)
    tokens = list(range(60))
    assert match(allocator, tokens, 60) == []
    new_blocks = allocator.insert_prefix(tokens, 60)
    assert [index for index, _ in new_blocks] == [0, 1, 2]
    block_ids = [block_id for _, block_id in new_blocks]
    assert match(allocator, tokens, 60) == block_ids
    assert match(allocator, tokens, 47) == block_ids[:2]
    assert match(allocator, [*tokens[:40], 99, *tokens[41:]], 60) == block_ids[:2]
    assert match(allocator, tokens[16:], 44) == []  # the same tokens behind another prefix
    assert allocator.insert_prefix(tokens, 60) == []


def test_least_recently_used_end_is_evicted_first() -> None:
    allocator = one_pool(4)
    old, new = [1] * 48, [2] * 32
    allocator.insert_prefix(old, 48)
    match(allocator, old, 16)
    allocator.insert_prefix(new, 32)
    assert len(match(allocator, new, 32)) == 2
    assert len(match(allocator, old, 48)) == 2
    allocator.check_integrity([])


def test_block_contents_match_under_random_use() -> None:
    rng = random.Random(0)
    allocator, content = one_pool(12), {}
    for _ in range(2000):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(0, 5))]
        tokens = [t for t in tokens for _ in range(BLOCK_SIZE)] + [7] * rng.randint(0, 15)
        block_ids = match(allocator, tokens, len(tokens))
        for i, block_id in enumerate(block_ids):
            assert content[block_id] == tokens[: (i + 1) * BLOCK_SIZE]
        for i, block_id in allocator.insert_prefix(tokens, len(tokens)):
            assert i >= len(block_ids)
            content[block_id] = tokens[: (i + 1) * BLOCK_SIZE]
        allocator.check_integrity([])
        assert allocator.usage == 0


def test_no_capacity_caches_nothing() -> None:
    allocator = one_pool(0)
    assert allocator.insert_prefix([1] * 99, 99) == []
    assert match(allocator, [1] * 99, 99) == []


def test_common_prefix_shares_blocks() -> None:
    allocator, tokens = one_pool(6), list(range(40))
    first = allocator.empty_tables()
    assert allocator.extend(first, 0, 40)
    assert allocator.match_prefix(tokens, 40) == [[]]  # taken, but nothing is computed yet
    allocator.commit(first, tokens, 40)
    second = allocator.match_prefix(tokens, 40)
    assert second == [first[0][:2]]
    assert allocator.extend(second, 32, 64)
    assert allocator.pools[0].num_free_blocks == 1
    allocator.check_integrity([first, second])
    allocator.free(first)
    assert (
        allocator.pools[0].num_free_blocks == 2
    )  # the two that are shared are tables by the second
    third = allocator.match_prefix(tokens, 40)
    assert third == [second[0][:2]]
    assert not allocator.extend(third, 32, 81)
    assert third == [second[0][:2]]  # all or none
    with pytest.raises(AssertionError):
        allocator.check_integrity([second])


def test_blocks_behind_the_window_are_freed() -> None:
    allocator = BlockAllocator([BlockPool(8), BlockPool(4, window=20)], max_step_tokens=BLOCK_SIZE)
    tokens = list(range(100))
    tables = allocator.empty_tables()
    for end in range(16, 113, 16):
        assert allocator.extend(tables, end - 16, end)
        allocator.commit(tables, tokens, min(end, 100))
    # The token at 96 sees those from 76 on: block 4 holds the first of them.
    assert tables[1][:4] == [NULL_BLOCK] * 4
    assert NULL_BLOCK not in tables[1][4:]
    assert NULL_BLOCK not in tables[0]
    allocator.check_integrity([tables])
    assert allocator.max_blocks(allocator.pools[1], 10_000) == 4
    again = allocator.match_prefix(tokens, 100)
    assert again[0] == tables[0][:6]
    assert again[1] == [NULL_BLOCK] * 4 + tables[1][4:6]
    # Behind 48 tokens one would see the second block, which has made room for others.
    short = allocator.match_prefix(tokens, 50)
    assert short == [[], []]
    allocator.check_integrity([tables, again, short])


def test_can_admit_reserves_for_running_sequences() -> None:
    allocator = one_pool(8)
    tables = allocator.empty_tables()
    allocator.extend(tables, 0, 16)
    assert allocator.can_admit(64, [(tables, 64)])
    assert not allocator.can_admit(65, [(tables, 64)])
    assert not allocator.can_admit(64, [(tables, 65)])


def test_no_leak_under_random_operations() -> None:
    rng = random.Random(1)
    allocator = BlockAllocator([BlockPool(24), BlockPool(14, window=40)], max_step_tokens=32)
    content: list[dict[int, list[int]]] = [{}, {}]
    live: list[tuple[BlockTables, list[int], int]] = []
    hits = failures = 0
    for _ in range(4000):
        act = rng.random()
        if act < 0.3 and len(live) < 5:
            kinds = [rng.randint(0, 1) for _ in range(9)]
            tokens = [kind for kind in kinds for _ in range(BLOCK_SIZE)]
            tables = allocator.match_prefix(tokens, rng.randint(0, len(tokens)))
            num_cached = len(tables[0]) * BLOCK_SIZE
            hits += num_cached > 0
            live.append((tables, tokens, num_cached))
        elif live and act < 0.85:
            i = rng.randrange(len(live))
            tables, tokens, start = live[i]
            end = min(len(tokens), start + rng.randint(1, 32))
            if allocator.extend(tables, start, end):
                for position in range(start, end):
                    for pool, block_ids in enumerate(tables):
                        block_id = block_ids[position // BLOCK_SIZE]
                        assert block_id != NULL_BLOCK
                        content[pool][block_id] = tokens[
                            : position // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE
                        ]
                allocator.commit(tables, tokens, end)
                live[i] = (tables, tokens, end)
            else:
                failures += 1
        elif live:
            tables, _, _ = live.pop(rng.randrange(len(live)))
            allocator.free(tables)
        allocator.check_integrity([tables for tables, _, _ in live])
        for tables, tokens, start in live:
            for pool, block_ids in enumerate(tables):
                window = allocator.pools[pool].window
                first = 0 if window < 0 else max(0, start - window)
                for position in range(first, start):
                    block_id = block_ids[position // BLOCK_SIZE]
                    assert (
                        content[pool][block_id]
                        == tokens[: position // BLOCK_SIZE * BLOCK_SIZE + BLOCK_SIZE]
                    )
    assert hits > 100
    assert failures > 100
