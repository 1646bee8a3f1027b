"""Where workers and driver meet: a small Ray actor on the driver's node, which nobody on the step path waits for.

Rank 0 posts what happens (`heliostat.events`). Every worker's heartbeat says that it lives and how far it is, and brings back
what the driver has ordered: `stop` (a code of `stop_codes`) and `dump` (post the stacks of all threads).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.events import Event, NodeSample

LIMIT = 100_000  # events; a driver that is away this long loses the oldest, and is told how many
SYSTEM_LIMIT = 10_000  # of them what nodes are busy with: many nodes crowd nothing else out


def interval(workers: int) -> float:
    """Seconds between two heartbeats of a worker: the mailbox answers some hundred a second with ease."""
    return max(1.0, workers / 100)


class State:
    """What the mailbox holds. All times are ages, in seconds by this process's clock, so that no two clocks are compared."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events = Bounded(LIMIT)
        self._system = Bounded(SYSTEM_LIMIT)
        self._heartbeats: dict[int, dict[str, Any]] = {}
        self._orders: dict[str, Any] = {}
        self._decisions: dict[int, int] = {}

    def post(self, event: Event) -> None:
        (self._system if isinstance(event, NodeSample) else self._events).add(event)

    def heartbeat(self, rank: int, progress: int, facts: dict[str, Any]) -> dict[str, Any]:
        """`facts`: pid and node."""
        now, before = self._clock(), self._heartbeats.get(rank)
        moved = before["moved"] if before and before["progress"] == progress else now
        self._heartbeats[rank] = {**facts, "progress": progress, "moved": moved, "at": now}
        return self._orders

    def order(self, **orders: Any) -> None:
        self._orders |= orders

    def decide(self, step: int, stop: int) -> None:
        """What becomes of the workers that wait behind `step`."""
        self._decisions.setdefault(step, stop)

    def decision(self, step: int) -> int | None:
        """The decision, once there is one; an order to stop is one too. What one worker was told, all are told."""
        if step not in self._decisions and self._orders.get("stop"):
            self._decisions[step] = self._orders["stop"]
        return self._decisions.get(step)

    def drain(self) -> tuple[list[Event], dict[int, dict[str, Any]], int]:
        """Events since the last call, every worker's last heartbeat, and how many events were lost.

        A heartbeat's `moved` and `at`: how long ago its worker got on, and was heard of.
        """
        now = self._clock()
        (events, lost), (system, more) = self._events.take(), self._system.take()
        heartbeats = {r: {**p, "moved": now - p["moved"], "at": now - p["at"]} for r, p in self._heartbeats.items()}
        return events + system, heartbeats, lost + more


class Bounded:
    """The newest of what was added, and how many older ones had to go."""

    def __init__(self, limit: int) -> None:
        self._kept: deque[Event] = deque(maxlen=limit)
        self._added = 0

    def add(self, event: Event) -> None:
        self._kept.append(event)
        self._added += 1

    def take(self) -> tuple[list[Event], int]:
        kept, lost = list(self._kept), self._added - len(self._kept)
        self._kept.clear()
        self._added = 0
        return kept, lost


Mailbox = ray.remote(num_cpus=0)(State)


def make() -> Any:
    """A mailbox on this node: it must not die with a worker's."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Mailbox.options(scheduling_strategy=here).remote()


def queued_s() -> float:
    """On a worker: how long its placement group waited for room."""
    table = ray.util.placement_group_table(ray.util.get_current_placement_group())
    return table["stats"]["end_to_end_creation_latency_ms"] / 1000
