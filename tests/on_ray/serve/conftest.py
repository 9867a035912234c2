"""A tiny real model in S3 on a real Ray Serve, one for all tests of this folder."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
from ray import serve

from nanochat_ray.config import to_json
from nanochat_ray.engine.config import EngineConfig
from nanochat_ray.on_ray.config import ServeConfig
from nanochat_ray.on_ray.serve import deployment
from nanochat_ray.on_ray.serve.deployment import build
from nanochat_ray.serve.keys import hash_key
from nanochat_ray.storage import Store
from tests.on_ray.serve.tiny_run import KEY, engines, write_checkpoint
from tests.tiny import TOKENIZER, free_ports
from tests.waiting import wait_for


@pytest.fixture(scope="package")
def config(s3: str) -> ServeConfig:
    root = Store.at(s3).child("serve")
    write_checkpoint(root, 0)
    TOKENIZER.save(root.child("tokenizers", TOKENIZER.fingerprint[:16]))
    return ServeConfig(
        storage=root.uri,
        run="tiny",
        num_replicas=2,
        max_replicas=3,
        upscale_delay_s=0,
        downscale_delay_s=1,
        num_ingress_replicas=2,
        cpus=0.5,
        key_hashes=(hash_key(KEY),),
        engine=EngineConfig(
            max_num_seqs=8,
            max_num_batched_tokens=64,
            max_queue_size=16,
            max_queue_s=0,  # a busy machine refuses nobody
        ),
    )


@pytest.fixture(scope="package")
def url(ray_session: None, config: ServeConfig) -> Iterator[str]:
    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    with pytest.MonkeyPatch.context() as patch:
        # Loads every second instead of every ten.
        often = functools.partial(deployment.AutoscalingConfig, metrics_interval_s=1)
        patch.setattr(deployment, "AutoscalingConfig", often)
        patch.setattr(deployment, "LOOK_BACK_S", 3)
        serve.run(build(to_json(config)), name="tiny", route_prefix="/")
    url = f"http://127.0.0.1:{port}"
    wait_for(lambda: len(engines(url)) == 2, 180, "two engines")
    yield url
    serve.shutdown()
