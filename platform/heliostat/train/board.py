"""Events from the workers to the driver: a small Ray actor that rank 0 posts to and the driver drains.

Posting does not wait, so the step path never does. Events are plain dicts with a `kind`: `phase` (what the workers are
busy with before their first step, and their end), `steps` (per-step losses and rates), `evaluation`, `checkpoint`.
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.train.v2._internal.execution.callback import WorkerGroupCallback

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


class Placing(WorkerGroupCallback):
    """Posts when Ray Train asks for room for the workers, which it does again when there is none for long."""

    def __init__(self, board: Any) -> None:
        self._board = board

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        self._board.post.remote({"kind": "phase", "phase": "placing", "at": time.time()})


def queued_s() -> float:
    """On a worker: how long its placement group waited for room."""
    table = ray.util.placement_group_table(ray.util.get_current_placement_group())
    return table["stats"]["end_to_end_creation_latency_ms"] / 1000
