"""What all tests share: a small real dataset, a small real model, a real S3 server."""

from __future__ import annotations

import gc
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nanochat_ray.cli.proxies import exempt_loopback
from nanochat_ray.storage import Store
from tests.s3_server import S3_KEYS, s3_server

if not Path("/dev/nvidia0").exists():
    # Triton reads this when a kernel is defined.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
exempt_loopback()
# Before any Ray starts, whose workers take over this environment.
os.environ["AWS_ACCESS_KEY_ID"] = S3_KEYS["accessKey"]
os.environ["AWS_SECRET_ACCESS_KEY"] = S3_KEYS["secretKey"]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
# Thousands of syncs, of milliseconds each, for files that no test wants after a loss of power.
os.fsync = lambda fd: None  # type: ignore[assignment]
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts jobs in the background so, and processes that the tests interrupt inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run tests marked kernels at every level of this processor, and with torch"
    parser.addoption("--all-kernels", action="store_true", help=text)
    text = "seed of torch's, numpy's and Python's random numbers, set before each test"
    parser.addoption("--seed", type=int, default=0, help=text)


def pytest_collection_finish() -> None:
    """Garbage collections skip the modules and tests, which would take 0.3 s each time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or extensions report all of it as leaked


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers(request: pytest.FixtureRequest) -> None:
    """A test sees the same numbers in any order and company; ``--seed`` tries it with others."""
    import numpy as np
    import torch

    seed = request.config.getoption("--seed")
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@pytest.fixture
def root(tmp_path: Path) -> Store:
    """An empty storage root in a folder."""
    return Store.at(str(tmp_path / "storage"))


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a bucket on a real S3 server (SeaweedFS) on loopback, for the keys in AWS_*."""
    with s3_server(tmp_path_factory.mktemp("s3")) as uri:
        yield uri


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of several nodes run when they are named: ``-m cluster``."""
    if "cluster" in config.option.markexpr:
        return
    skip = pytest.mark.skip(reason="several nodes: pytest -m cluster")
    for item in items:
        if item.get_closest_marker("cluster"):
            item.add_marker(skip)
