"""Where workers and driver meet: a small Ray actor on the driver's node, which nobody on the step path waits for.

Rank 0 posts events: plain dicts with a `kind`: `phase` (what the workers are busy with before their first step, and their end),
`steps` (per-step losses and rates), `evaluation`, `checkpoint`, `notice` (a text for the terminal), `held` (they wait for a
verdict, see `holds`), `stack`. Every worker's pulse says that it lives and how far it is, and brings back what the driver has
ordered: `stop` (a code of `survive`) and `dump` (post the stacks of all threads).
"""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LIMIT = 100_000  # events; a driver that is away this long loses the oldest


@ray.remote(num_cpus=0)
class Board:
    def __init__(self) -> None:
        self._events: list[dict[str, Any]] = []
        self._pulses: dict[int, dict[str, Any]] = {}
        self._orders: dict[str, Any] = {}
        self._verdicts: dict[int, int] = {}

    def post(self, event: dict[str, Any]) -> None:
        self._events.append(event)
        del self._events[:-LIMIT]

    def pulse(self, rank: int, progress: int, facts: dict[str, Any]) -> dict[str, Any]:
        """`moved` and `at` are this clock's, so that no worker's clock matters; `facts`: pid and node."""
        now, before = time.time(), self._pulses.get(rank)
        moved = before["moved"] if before and before["progress"] == progress else now
        self._pulses[rank] = {**facts, "progress": progress, "moved": moved, "at": now}
        return self._orders

    def order(self, **orders: Any) -> None:
        self._orders |= orders

    def decide(self, step: int, stop: int) -> None:
        """What becomes of the workers that wait behind `step`."""
        self._verdicts.setdefault(step, stop)

    def verdict(self, step: int) -> int | None:
        """The decision, once there is one; an order to stop is one too. What one worker was told, all are told."""
        if step not in self._verdicts and self._orders.get("stop"):
            self._verdicts[step] = self._orders["stop"]
        return self._verdicts.get(step)

    def drain(self) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
        """Events since the last call, and every worker's last pulse."""
        events, self._events = self._events, []
        return events, self._pulses


def make() -> Any:
    """A board on this node: it must not die with a worker's."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


def queued_s() -> float:
    """On a worker: how long its placement group waited for room."""
    table = ray.util.placement_group_table(ray.util.get_current_placement_group())
    return table["stats"]["end_to_end_creation_latency_ms"] / 1000
