"""The kernels of the tests marked ``kernels``: with ``--all-kernels`` each runs at every level."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from nanochat_ray.engine.kernels import available, load_kernels

NO_COMPILER = "no compiler"
LEVELS = (*available(), "torch", NO_COMPILER)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_marked = metafunc.definition.get_closest_marker("kernels") is not None
    if is_marked and metafunc.config.getoption("--all-kernels"):
        metafunc.fixturenames.append("kernel_level")
        metafunc.parametrize("kernel_level", LEVELS, indirect=True, scope="function")


@pytest.fixture
def kernel_level(request: pytest.FixtureRequest) -> Iterator[str]:
    """What engines take by default: a level, torch, or what is left without a C compiler."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == NO_COMPILER:
            load_kernels.cache_clear()
            patch.setenv("CC", "/none/cc")
        else:
            patch.setenv("NANOCHAT_KERNELS", request.param)
        yield request.param
    if request.param == NO_COMPILER:
        load_kernels.cache_clear()
