"""Follows a run on Ray Serve: a deployment of one replica that rolls new checkpoints out.

The engine replicas get new weights one after the other, so that the others take new requests
meanwhile. A replica that starts with another checkpoint, since it was restarted or added during a
roll, is swapped too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any, TypeVar

from ray.exceptions import RayTaskError
from ray.serve.handle import DeploymentHandle

from nanochat_ray.checkpoint import follow
from nanochat_ray.checkpoint.follow import CheckpointWatcher, NewCheckpoint, ServedCheckpoint
from nanochat_ray.on_ray.serve.endpoints import CALL_ERRORS, list_endpoints
from nanochat_ray.on_ray.serve.metrics import RaySink
from nanochat_ray.retry import is_outage, reason, retry
from nanochat_ray.serve.follow import Follower
from nanochat_ray.serve.metrics import FollowMetrics
from nanochat_ray.storage import Store

SWAP_TIMEOUT_S = 120.0
"""How long a replica may take to read and load a checkpoint, beside its drain."""
T = TypeVar("T")
logger = logging.getLogger(__name__)


class FollowDeployment:
    """``name`` is the model's; ``drain_s`` that of the engine replicas."""

    def __init__(
        self,
        engines: DeploymentHandle,
        storage: str,
        run: str,
        name: str,
        drain_s: float,
    ):
        self.engines, self.name, self.drain_s = engines, name, drain_s
        self.run = Store.at(storage).child("runs", run)
        self.follower: Follower | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._metrics = FollowMetrics(RaySink(name))

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Starts to follow, by the ``target`` and ``margin`` of ``user_config``."""
        await self._close()
        self._loop = asyncio.get_running_loop()
        self.follower = await asyncio.to_thread(self._start, **user_config)

    def _start(self, target: follow.Target, margin: float) -> Follower:
        def current_checkpoint() -> ServedCheckpoint:
            first = follow.first_checkpoint(self.run, self.name, target)
            return ServedCheckpoint.of(self.run, first)

        current = retry(current_checkpoint, "the checkpoint to begin with")
        # A replica reads the weights in any case, and verifies them before it takes them.
        watcher = CheckpointWatcher(
            self.run, self.name, target, current, margin=margin, reads_weights=False
        )
        follower = Follower(watcher, self._roll, self._reconcile)
        follower.start()
        return follower

    async def status(self) -> dict[str, Any]:
        """``CheckpointWatcher.status``."""
        return self.follower.status() if self.follower is not None else {}

    # ---- in the follower's thread

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _roll(self, new: NewCheckpoint) -> None:
        """All replicas or none: if one refuses the checkpoint, the others return to the old."""
        assert self.follower is not None
        try:
            self._swap_all(new.about)
        except ValueError:
            self._swap_all(self.follower.watcher.current)
            raise

    def _reconcile(self) -> None:
        """Swaps replicas that serve another checkpoint than they should."""
        assert self.follower is not None
        self._metrics.update(self.follower.status())
        try:
            self._swap_all(self.follower.watcher.current)
        except (ValueError, RuntimeError, OSError) as error:
            logger.warning("an engine replica does not serve the checkpoint: %s", error)

    def _swap_all(self, target: ServedCheckpoint) -> None:
        """Raises ValueError if a replica refuses it, RuntimeError if one cannot be reached, OSError
        if one cannot read it now."""
        for replica, version in self._wait(self._versions()).items():
            if version != target.version:
                self._wait(self._swap(replica, target))

    async def _versions(self) -> dict[str, str]:
        """The weights of each replica that serves."""
        try:
            endpoints = await list_endpoints(self.engines)
        except CALL_ERRORS as error:
            raise RuntimeError(f"the engine replicas cannot be listed: {error}") from None
        return {e["replica"]: e["weight_version"] for e in endpoints}

    async def _swap(self, replica: str, target: ServedCheckpoint) -> None:
        """One replica; the others ignore the call. A replica that dies meanwhile is no error: its
        successor is swapped later, if it has to be."""
        try:
            results = await self.engines.broadcast("swap", replica, target.name).results_async(
                timeout_s=self.drain_s + SWAP_TIMEOUT_S, return_exceptions=True
            )
        except CALL_ERRORS as error:
            raise RuntimeError(f"engine replica {replica} does not answer: {error}") from None
        refusal = next((r for r in results if isinstance(r, str) and r), None)
        if refusal is not None:
            raise ValueError(refusal)
        for result in results:
            # Of Ray's errors, RayTaskError is what the replica raised; others say that it died.
            cause = result.cause if isinstance(result, RayTaskError) else result
            if isinstance(cause, OSError) and is_outage(cause):
                raise OSError(f"engine replica {replica} cannot read it: {reason(cause)}")
            if isinstance(result, RayTaskError | OSError):
                raise ValueError(f"engine replica {replica} failed: {reason(cause)}")

    async def _close(self) -> None:
        if self.follower is not None:
            follower, self.follower = self.follower, None
            await asyncio.to_thread(follower.close)

    async def __del__(self) -> None:
        await self._close()
