"""Which replica gets a prompt: the policy alone."""

from __future__ import annotations

from nanochat_ray.on_ray.serve.routing import MAX_LEAD, PrefixRouter


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
