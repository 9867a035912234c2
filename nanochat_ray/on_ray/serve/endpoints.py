"""Asks the engine replicas of a deployment where they listen and what they serve."""

from __future__ import annotations

from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

CALL_ERRORS = (RayError, RayServeException, TimeoutError)
"""What a call of a deployment raises that does not run, restarts or does not answer."""
LIST_TIMEOUT_S = 10.0


async def list_endpoints(engines: DeploymentHandle) -> list[dict[str, Any]]:
    """``EngineReplica.endpoint`` of each replica that answered. Raises one of CALL_ERRORS."""
    endpoints = await engines.broadcast("endpoint").results_async(
        timeout_s=LIST_TIMEOUT_S, return_exceptions=True
    )
    return [endpoint for endpoint in endpoints if isinstance(endpoint, dict)]
