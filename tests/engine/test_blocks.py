"""The accounting of blocks against sets that remember everything."""

from __future__ import annotations

import random

import pytest

from nanochat_ray.engine.blocks import BLOCK, VOID, BlockPool, Blocks, Held


def one(capacity: int) -> Blocks:
    return Blocks([BlockPool(capacity)])


def match(blocks: Blocks, tokens: list[int], limit: int) -> list[int]:
    """Looks without holding, as the slots do."""
    held = blocks.match(tokens, limit)
    blocks.release(held)
    return held[0]


def test_a_beginning_is_found_as_far_as_it_is_the_same() -> None:
    blocks = one(10)
    tokens = list(range(60))
    assert match(blocks, tokens, 60) == []
    wanted = blocks.keep(tokens, 60)
    assert [index for index, _ in wanted] == [0, 1, 2]
    places = [place for _, place in wanted]
    assert match(blocks, tokens, 60) == places
    assert match(blocks, tokens, 47) == places[:2]
    assert match(blocks, [*tokens[:40], 99, *tokens[41:]], 60) == places[:2]
    assert match(blocks, tokens[16:], 44) == []  # the same tokens behind another beginning
    assert blocks.keep(tokens, 60) == []
    assert (blocks.queried, blocks.hit) == (271, 112)


def test_the_end_of_what_was_used_longest_ago_goes_first() -> None:
    blocks = one(4)
    old, new = [1] * 48, [2] * 32
    blocks.keep(old, 48)
    match(blocks, old, 16)
    blocks.keep(new, 32)
    assert len(match(blocks, new, 32)) == 2
    assert len(match(blocks, old, 48)) == 2
    blocks.check_integrity([])


def test_places_never_clash_under_random_use() -> None:
    rng = random.Random(0)
    blocks, content = one(12), {}
    for _ in range(2000):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(0, 5))]
        tokens = [t for t in tokens for _ in range(BLOCK)] + [7] * rng.randint(0, 15)
        places = match(blocks, tokens, len(tokens))
        for i, place in enumerate(places):
            assert content[place] == tokens[: (i + 1) * BLOCK]
        for i, place in blocks.keep(tokens, len(tokens)):
            assert i >= len(places)
            content[place] = tokens[: (i + 1) * BLOCK]
        blocks.check_integrity([])
        assert blocks.used == 0


def test_no_capacity_keeps_nothing() -> None:
    blocks = one(0)
    assert blocks.keep([1] * 99, 99) == []
    assert match(blocks, [1] * 99, 99) == []


def test_who_begins_the_same_holds_the_same_blocks() -> None:
    blocks, tokens = one(6), list(range(40))
    first = blocks.empty()
    assert blocks.extend(first, 0, 40)
    assert blocks.match(tokens, 40) == [[]]  # taken, but nothing is computed yet
    blocks.register(first, tokens, 40)
    second = blocks.match(tokens, 40)
    assert second == [first[0][:2]]
    assert blocks.extend(second, 32, 64)
    assert blocks.pools[0].room == 1
    blocks.check_integrity([first, second])
    blocks.release(first)
    assert blocks.pools[0].room == 2  # the two that are shared are held by the second
    third = blocks.match(tokens, 40)
    assert third == [second[0][:2]]
    assert not blocks.extend(third, 32, 81)
    assert third == [second[0][:2]]  # all or none
    with pytest.raises(AssertionError):
        blocks.check_integrity([second])


def test_blocks_behind_the_window_are_given_back_and_need_not_be_known() -> None:
    blocks = Blocks([BlockPool(8), BlockPool(4, window=20)], step=BLOCK)
    tokens = list(range(100))
    held = blocks.empty()
    for end in range(16, 113, 16):
        assert blocks.extend(held, end - 16, end)
        blocks.register(held, tokens, min(end, 100))
    # The token at 96 sees those from 76 on: block 4 holds the first of them.
    assert held[1][:4] == [VOID] * 4
    assert VOID not in held[1][4:]
    assert VOID not in held[0]
    blocks.check_integrity([held])
    assert blocks.need(blocks.pools[1], 10_000) == 4
    again = blocks.match(tokens, 100)
    assert again[0] == held[0][:6]
    assert again[1] == [VOID] * 4 + held[1][4:6]
    # Behind 48 tokens one would see the second block, which has made room for others.
    short = blocks.match(tokens, 50)
    assert short == [[], []]
    blocks.check_integrity([held, again, short])


def test_room_counts_what_others_are_still_to_get() -> None:
    blocks = one(8)
    held = blocks.empty()
    blocks.extend(held, 0, 16)
    assert blocks.admits(64, [(held, 64)])
    assert not blocks.admits(65, [(held, 64)])
    assert not blocks.admits(64, [(held, 65)])


def test_nothing_is_lost_and_nothing_clashes_under_random_operations() -> None:
    rng = random.Random(1)
    blocks = Blocks([BlockPool(24), BlockPool(14, window=40)], step=32)
    content: list[dict[int, list[int]]] = [{}, {}]
    live: list[tuple[Held, list[int], int]] = []
    hits = failures = 0
    for _ in range(4000):
        act = rng.random()
        if act < 0.3 and len(live) < 5:
            kinds = [rng.randint(0, 1) for _ in range(9)]
            tokens = [kind for kind in kinds for _ in range(BLOCK)]
            held = blocks.match(tokens, rng.randint(0, len(tokens)))
            known = len(held[0]) * BLOCK
            hits += known > 0
            live.append((held, tokens, known))
        elif live and act < 0.85:
            i = rng.randrange(len(live))
            held, tokens, done = live[i]
            end = min(len(tokens), done + rng.randint(1, 32))
            if blocks.extend(held, done, end):
                for place in range(done, end):
                    for pool, places in enumerate(held):
                        at = places[place // BLOCK]
                        assert at != VOID
                        content[pool][at] = tokens[: place // BLOCK * BLOCK + BLOCK]
                blocks.register(held, tokens, end)
                live[i] = (held, tokens, end)
            else:
                failures += 1
        elif live:
            held, _, _ = live.pop(rng.randrange(len(live)))
            blocks.release(held)
        blocks.check_integrity([held for held, _, _ in live])
        for held, tokens, done in live:
            for pool, places in enumerate(held):
                window = blocks.pools[pool].window
                first = 0 if window < 0 else max(0, done - window)
                for place in range(first, done):
                    at = places[place // BLOCK]
                    assert content[pool][at] == tokens[: place // BLOCK * BLOCK + BLOCK]
    assert hits > 100
    assert failures > 100
