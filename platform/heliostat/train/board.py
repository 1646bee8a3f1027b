"""Events from the workers to the driver: a small Ray actor that rank 0 posts to and the driver drains.

Posting does not wait, so the step path never does. Events are plain dicts with a `kind`: `phase` (what a worker is busy
with before its first step), `steps` (per-step losses and rates), `evaluation`, `checkpoint`.
"""

from __future__ import annotations

from typing import Any

import ray

LIMIT = 100_000  # events; a driver that is away this long loses the oldest


@ray.remote(num_cpus=0)
class Board:
    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []

    def post(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        del self._events[:-LIMIT]

    def drain(self) -> list[dict[str, Any]]:
        events, self._events = self._events, []
        return events
