"""Which replica gets a prompt: the policy alone."""

from __future__ import annotations

import pytest

from nanochat_ray.on_ray.serve import routing
from nanochat_ray.on_ray.serve.routing import MAX_LEAD, PrefixRouter, hash_blocks


def test_cached_prefixes_win_over_small_loads() -> None:
    router = PrefixRouter()
    system, other = list(range(100)), list(range(200, 300))
    router.record("a", [*system, 1])
    router.record("b", other)
    assert router.choose([*system, 7, 8], {"a": 3, "b": 1}) == "a"
    assert router.choose([*system, 7, 8], {"a": 3 + MAX_LEAD, "b": 1}) == "b"
    assert router.choose([*other, 7], {"a": 0, "b": 1}) == "b"
    assert router.choose([5], {"a": 1, "b": 0}) == "b"
    # Another scope finds nothing there.
    assert router.choose([*system, 7, 8], {"a": 1, "b": 0}, "bob") == "b"
    router.record("a", system, "bob")
    assert router.choose([*system, 7, 8], {"a": 1, "b": 0}, "bob") == "a"
    router.forget("a")
    assert router.choose(system, {"a": 1, "b": 0}) == "b"


@pytest.mark.parametrize(("length", "count"), [(0, 0), (15, 0), (16, 1), (17, 1), (31, 1), (32, 2)])
def test_only_complete_blocks_have_a_hash(length: int, count: int) -> None:
    assert len(hash_blocks([1] * length)) == count


def test_the_longest_prefix_wins() -> None:
    """Up to four requests more than the least busy replica; among equal prefixes the load."""
    router = PrefixRouter()
    first, second = [1] * 16, [2] * 16
    router.record("a", first)
    router.record("b", [*first, *second])
    for load, choice in ((1, "b"), (5, "b"), (6, "a")):
        assert router.choose([*first, *second], {"a": 1, "b": load}) == choice
    assert router.choose(first, {"a": 2, "b": 1, "c": 0}) == "b"
    # A block counts only behind the blocks before it.
    assert router.choose([*second, *second], {"a": 1, "b": 1, "c": 0}) == "c"


def test_the_oldest_blocks_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, "MAX_BLOCKS", 3)
    router, loads = PrefixRouter(), {"a": 1, "b": 0}
    two, one, other = [1] * 32, [2] * 16, [3] * 16
    router.record("a", two)
    router.record("a", one)
    assert [router.choose(tokens, loads) for tokens in (two, one)] == ["a", "a"]
    router.record("a", two)  # used again, so that the other one is the oldest
    router.record("a", other)
    assert [router.choose(tokens, loads) for tokens in (two, one, other)] == ["a", "b", "a"]
