"""Deploys the HTTP server and its replicas on Ray Serve.

The HTTP server calls the replicas through Serve's handles. Every port is bound to the node's own address.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any, cast

from ray import serve
from ray.exceptions import ActorUnavailableError, NodeDiedError, OwnerDiedError, RayActorError, WorkerCrashedError
from ray.experimental import internal_kv
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from heliostat.apps.serve.asks import Holds, Item
from heliostat.apps.serve.front import Front
from heliostat.apps.serve.gateway import A, FrontSettings, Pieces, Work
from heliostat.apps.serve.replica import Replica

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle, DeploymentResponse, DeploymentResponseGenerator

EVERYWHERE = "[::]:"
NAMESPACE = "heliostat"  # Ray namespace of an endpoint's records on its cluster
STARTED = "heliostat-serve-started"  # the cluster's store contains this key while the cluster's Ray Serve belongs to an endpoint
# errors of a call whose replica died, or ended before it accepted the call
LOST = (RayActorError, ActorUnavailableError, WorkerCrashedError, NodeDiedError, OwnerDiedError, ReplicaUnavailableError,
        DeploymentUnavailableError)  # fmt: skip


class Handles:
    """Keeps a Serve handle for the current version. A handle knows the version's replicas and the load of each replica."""

    def __init__(self) -> None:
        self.known: dict[str, DeploymentHandle[Replica]] = {}

    def _of(self, version: str) -> DeploymentHandle[Replica]:
        if version not in self.known:
            self.known = {name: handle for name, handle in self.known.items() if name == version}
            self.known[version] = serve.get_app_handle(version)
        return self.known[version]

    async def call(self, version: str, answer: Work[A], request: A) -> Item:
        """Calls `answer` in a replica, and returns the complete answer."""
        return await _answered(cast("DeploymentResponse[Item]", self._of(version).ask.remote(answer, request)))

    async def stream(self, version: str, pieces: Pieces[A], request: A) -> AsyncGenerator[Item]:
        """Yields the answer piece by piece; stops the replica's work on the answer if the client leaves."""
        stream = self._of(version).options(stream=True).stream
        items = cast("DeploymentResponseGenerator[Item]", stream.remote(pieces, request))
        over = False
        try:
            async for item in items:
                yield item
            over = True
        finally:
            if not over:
                items.cancel()


async def _answered(response: DeploymentResponse[Item]) -> Item:
    """Waits for an answer; stops the replica's work on this answer if the client leaves."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


def confine() -> None:
    """Makes Ray Serve bind each replica's gRPC port to the node's address. Call this function before Serve opens the port.

    Ray 2.60 opens this port on all addresses, even if no call uses gRPC. heliostat's calls never use gRPC.
    """
    import ray
    from ray.serve._private import replica

    module: Any = replica
    open_port = module.add_port_to_grpc_server
    address = ray.util.get_node_ip_address()

    def confined(server: object, listen: str) -> object:
        return open_port(server, listen.replace(EVERYWHERE, f"{address}:"))

    module.add_port_to_grpc_server = confined


def record_start(started: bool) -> None:
    """Records on the cluster that an endpoint has started the cluster's Ray Serve. With `started=False`, deletes this record."""
    if started:
        internal_kv._internal_kv_put(STARTED, b"1", namespace=NAMESPACE)
    else:
        internal_kv._internal_kv_del(STARTED, namespace=NAMESPACE)


def started_here() -> bool:
    """Returns whether an endpoint started the cluster's Ray Serve."""
    return internal_kv._internal_kv_get(STARTED, namespace=NAMESPACE) is not None


class DeployedFront(Front):
    """Answers HTTP requests that Serve's proxy forwards."""

    def __init__(self, settings: FrontSettings) -> None:
        confine()
        super().__init__(settings, Handles(), LOST)


class DeployedReplica(Replica):
    """Answers requests that arrive through Serve's handles."""

    def __init__(self, holds: Holds) -> None:
        confine()
        super().__init__(holds)
