"""Calls addressed to one given replica, through Serve's own request router.

An ingress holds one stream to each engine and must hand a request to the engine of its choice,
which Serve's routers do not offer: here a call names its replica in the keyword ``replica``.
"""

from __future__ import annotations

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

# What an engine's ``submit`` answers.
ACCEPTED = "accepted"
QUEUE_FULL = "queue full"
NOT_HERE = "not here"
"""Another replica was meant, or the caller has no stream there: nothing was done."""


class AddressedRouter(RequestRouter):
    """Routes a call with ``replica=<unique id>`` to that replica, any other call to anyone.

    A replica that is gone is no reason to wait for it: the call then goes to another, which
    sees that it was not meant and refuses (``NOT_HERE``).
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        wanted = pending_request.kwargs.get("replica") if pending_request is not None else None
        named = [r for r in candidate_replicas if r.replica_id.unique_id == wanted]
        return [named or list(candidate_replicas)]
