"""Three nodes and an S3 server, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.on_ray.cluster.nodes import Nodes, missing_requirement
from tests.s3_server import s3_server


@pytest.fixture(scope="package")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    if reason := missing_requirement():
        pytest.skip(reason)
    one = Nodes(tmp_path_factory.mktemp("nodes"))
    try:
        one.start()
        yield one
    finally:
        one.close()


@pytest.fixture(scope="package")
def storage(nodes: Nodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URI of a bucket that all nodes reach."""
    with s3_server(tmp_path_factory.mktemp("s3"), nodes.host) as uri:
        yield uri
