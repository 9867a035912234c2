"""The accounting of kept prompt beginnings against a set that remembers everything."""

from __future__ import annotations

import random

from nanochat_ray.engine.blocks import BLOCK, PrefixBlocks


def test_a_beginning_is_found_as_far_as_it_is_the_same() -> None:
    blocks = PrefixBlocks(10)
    tokens = list(range(60))
    assert blocks.match(tokens, 60) == []
    wanted = blocks.keep(tokens, 60)
    assert [index for index, _ in wanted] == [0, 1, 2]
    places = [place for _, place in wanted]
    assert blocks.match(tokens, 60) == places
    assert blocks.match(tokens, 47) == places[:2]
    assert blocks.match([*tokens[:40], 99, *tokens[41:]], 60) == places[:2]
    assert blocks.match(tokens[16:], 44) == []  # the same tokens behind another beginning
    assert blocks.keep(tokens, 60) == []
    assert (blocks.queried, blocks.hit) == (271, 112)


def test_the_end_of_what_was_used_longest_ago_goes_first() -> None:
    blocks = PrefixBlocks(4)
    old, new = [1] * 48, [2] * 32
    blocks.keep(old, 48)
    blocks.match(old, 16)
    blocks.keep(new, 32)
    assert len(blocks.match(new, 32)) == 2
    assert len(blocks.match(old, 48)) == 2
    blocks.check_integrity()


def test_places_never_clash_under_random_use() -> None:
    rng = random.Random(0)
    blocks, content = PrefixBlocks(12), {}
    for _ in range(2000):
        tokens = [rng.randint(0, 1) for _ in range(rng.randint(0, 5))]
        tokens = [t for t in tokens for _ in range(BLOCK)] + [7] * rng.randint(0, 15)
        places = blocks.match(tokens, len(tokens))
        for i, place in enumerate(places):
            assert content[place] == tokens[: (i + 1) * BLOCK]
        for i, place in blocks.keep(tokens, len(tokens)):
            assert i >= len(places)
            content[place] = tokens[: (i + 1) * BLOCK]
        blocks.check_integrity()
        assert len(blocks) <= 12


def test_no_capacity_keeps_nothing() -> None:
    blocks = PrefixBlocks(0)
    assert blocks.keep([1] * 99, 99) == []
    assert blocks.match([1] * 99, 99) == []
