"""The HTTP side of Serve; imports no torch, so that an ingress is small and starts quickly."""

from __future__ import annotations

import logging

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from nanochat_ray.on_ray.serve.client import RayEngineClient
from nanochat_ray.on_ray.serve.metrics import RaySink
from nanochat_ray.retry import retry
from nanochat_ray.serve import access, keys
from nanochat_ray.serve.app import build_app
from nanochat_ray.serve.collector import freeze_gc
from nanochat_ray.serve.generation import Limits
from nanochat_ray.storage import Store
from nanochat_ray.text.tokenizer import Tokenizer


@serve.ingress()
class Ingress:
    """HTTP, templates and tokenizing; holds no model."""

    def __init__(
        self,
        engines: DeploymentHandle,
        tokenizer: str,
        fingerprint: str,
        name: str,
        max_model_len: int,
        key_hashes: list[str],
        key_file: str,
        deadline_s: float,
        liveness_timeout_s: float,
        request_timeout_s: float,
        allowed_origins: list[str],
        suggestions: list[str],
        allowed_hosts: list[str],
        access_log: bool,
        follower: DeploymentHandle | None = None,
    ):
        """``tokenizer``: URI of the folder that has it."""
        self.tokenizer = retry(
            lambda: Tokenizer.load(Store.at(tokenizer), fingerprint), "the tokenizer"
        )
        self.name, self.max_model_len = name, max_model_len
        # From the deployment alone: the environment of a worker may be older.
        self.keys = [*key_hashes, *(keys.from_file(key_file) if key_file else [])]
        self.limits = Limits(request_timeout_s=request_timeout_s)
        self.allowed_origins, self.suggestions = allowed_origins, suggestions
        self.allowed_hosts = allowed_hosts
        if access_log:
            access.log_to(logging.getLogger("ray.serve").handlers)  # the log file of this replica
        self.client = RayEngineClient(
            engines,
            deadline_s=deadline_s,
            liveness_timeout_s=liveness_timeout_s,
            follower=follower,
        )

    async def __serve_build_asgi_app__(self) -> FastAPI:
        self.client.start()
        freeze_gc()
        return build_app(
            self.client,
            self.tokenizer,
            self.name,
            self.max_model_len,
            limits=self.limits,
            keys=self.keys,
            sink=RaySink(self.name),
            allowed_origins=self.allowed_origins,
            allowed_hosts=self.allowed_hosts,
            suggestions=self.suggestions,
        )

    async def __del__(self) -> None:
        await self.client.close()
