"""The kernels of the tests marked ``kernels``: with ``--all-kernels`` each runs at every level."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nanochat_ray.engine.kernels import available

# Without a compiler engines compute as at level torch: test_kernels.py.
LEVELS = (*available(), "torch")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_marked = metafunc.definition.get_closest_marker("kernels") is not None
    if is_marked and metafunc.config.getoption("--all-kernels"):
        metafunc.fixturenames.append("kernel_level")
        metafunc.parametrize("kernel_level", LEVELS, indirect=True, scope="function")


@pytest.fixture
def kernel_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """What engines take by default: a level, or torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_KERNELS", request.param)
        yield request.param
