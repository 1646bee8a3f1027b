"""Answers the front in its own process, with one replica that is there: no Ray."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from heliostat.apps.serve.asks import Ask
from heliostat.apps.serve.replica import Replica


class Local:
    """Reaches the one replica, whatever the version."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica

    async def call(self, version: str, what: str, asked: Any) -> dict[str, Any]:
        """Asks for something as a whole: a method of `Replica`, by its name."""
        return await getattr(self.replica, what)(asked)

    def stream(self, version: str, ask: Ask) -> AsyncGenerator[dict[str, Any]]:
        """Answers prompts piece by piece."""
        return self.replica.stream(ask)
