"""Reaches the replicas of each version through Ray Serve's handles."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.exceptions import ActorUnavailableError, NodeDiedError, OwnerDiedError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError

from heliostat.apps.serve.asks import Ask

# what a call ends with if its replica died, or was ended before it took the call
LOST = (RayActorError, ActorUnavailableError, WorkerCrashedError, NodeDiedError, OwnerDiedError, ReplicaUnavailableError,
        DeploymentUnavailableError)  # fmt: skip


class Handles:
    """Keeps a handle for each version: it knows the version's replicas, and how busy they are."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def _of(self, version: str) -> Any:
        if version not in self.known:
            self.known = {name: handle for name, handle in self.known.items() if name == version}
            self.known[version] = serve.get_app_handle(version)
        return self.known[version]

    async def call(self, version: str, what: str, asked: Any) -> dict[str, Any]:
        """Asks for something as a whole: a method of `Replica`, by its name."""
        return await _answered(getattr(self._of(version), what).remote(asked))

    async def stream(self, version: str, ask: Ask) -> AsyncGenerator[dict[str, Any]]:
        """Answers prompts piece by piece; ends the replica's work if nobody takes the pieces any more."""
        pieces = self._of(version).options(stream=True).stream.remote(ask)
        over = False
        try:
            async for piece in pieces:
                yield piece
            over = True
        finally:
            if not over:
                pieces.cancel()


async def _answered(response: Any) -> dict[str, Any]:
    """Waits for an answer; ends the replica's work on it if nobody waits any more."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
