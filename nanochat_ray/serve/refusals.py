"""Answers the requests of a flood from their heads.

While the engines refuse a client, nothing that its requests carry matters. To answer one within the
HTTP parser (``protocol``) takes half of the CPU time of a task through all middleware, and on one
machine that time is the engines' (figures: ``BENCHMARKS.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from starlette.types import Scope

from nanochat_ray.engine.request import EngineFull
from nanochat_ray.serve import access
from nanochat_ray.serve.auth import content_length, name_of_client
from nanochat_ray.serve.hosts import is_allowed
from nanochat_ray.serve.keys import KeyRing
from nanochat_ray.serve.openai import errors
from nanochat_ray.serve.serving import Serving

Headers = Sequence[tuple[bytes, bytes]]
HAS_BEGUN = "nanochat_has_begun"
"""In the scope of a request: whether it has passed the gate."""


class Refusals:
    """What an application answers to requests that its gate refuses."""

    def __init__(
        self,
        serving: Serving,
        keys: KeyRing,
        paths: Sequence[str],
        allowed_hosts: Sequence[str],
    ):
        """``paths``: of the requests that pass the gate of ``serving``."""
        self._gate, self._metrics, self._keys = serving.gate, serving.metrics, keys
        self._max_body_bytes = serving.limits.max_body_bytes
        self._paths = frozenset(path.encode() for path in paths)
        self._allowed_hosts = [host.lower() for host in allowed_hosts]
        self._last: EngineFull | None = None
        self._headers: Headers = ()
        self._body = b""

    def answer(self, target: bytes, scope: Scope) -> tuple[int, Headers, bytes] | None:
        """Status, headers and body of the answer to a POST, which is counted and logged; None if
        the application has to look at it: the gate lets it pass, or it may be wrong in itself."""
        if target not in self._paths:
            return None
        fields = dict(scope["headers"])
        if (
            len(fields) < len(scope["headers"])  # one is repeated
            or fields.get(b"content-type") != b"application/json"
            or b"content-encoding" in fields
            or b"origin" in fields  # CORS
            or content_length(fields) > self._max_body_bytes
            or not self._allows(fields.get(b"host"))
        ):
            return None
        client = name_of_client(self._keys, fields) if self._keys else ""
        if client is None:
            return None
        refusal = self._gate.refusal(client)
        if refusal is None:
            scope[HAS_BEGUN] = self._gate.begin_in_flood(client)
            return None
        if refusal is not self._last:
            response = errors.queue_full(str(refusal), refusal.retry_after_s).response()
            self._last, self._headers = refusal, response.raw_headers
            self._body = bytes(response.body)
        self._metrics.refusals(1, "429")
        own = access.id_of(fields)
        access.log("POST", target.decode(), 429, 0.0, len(self._body), own.decode())
        return 429, [*self._headers, (access.REQUEST_ID, own)], self._body

    def _allows(self, host: bytes | None) -> bool:
        is_any = not self._allowed_hosts or host is None
        return is_any or is_allowed(cast(bytes, host).decode("latin-1"), self._allowed_hosts)
