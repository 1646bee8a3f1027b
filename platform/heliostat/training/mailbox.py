"""Connects workers and driver through a mailbox: a small Ray actor on the driver's node, which the step path never waits for.

Rank 0 posts events (`runs.events`). Every worker's heartbeat reports that it is alive and how far it is, and returns what
the driver has ordered: `stop` (a code of `stops`), `dump` (post the stacks of all threads), `profile` (of one worker's steps)
and `abort` (come back from NCCL's collectives: a worker has failed).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TypedDict, cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.runs.events import Event, NodeSample
from heliostat.runs.profile import ProfileRequest

LIMIT = 100_000  # events; a driver that is away this long loses the oldest, and learns how many
SYSTEM_LIMIT = 10_000  # of them what nodes are busy with: many nodes crowd nothing else out


class Facts(TypedDict):
    """Describes a worker in its heartbeat: its process and node, the step that it makes, from 1 on, and the micro-batches of that
    step so far."""

    pid: int
    node: str
    step: int
    micro: int


class Pulse(Facts):
    """Describes a worker's last heartbeat: `at`, and `moved`, when `progress` last changed."""

    progress: int
    moved: float
    at: float


class Orders(TypedDict, total=False):
    """Describes what the driver has ordered."""

    stop: int
    dump: bool
    profile: ProfileRequest
    abort: bool


def interval(workers: int) -> float:
    """Computes the seconds between two heartbeats of a worker: the mailbox easily answers some hundred a second."""
    return max(1.0, workers / 100)


class MailboxState:
    """Holds the mailbox's events, heartbeats, orders and decisions.

    All times are ages, in seconds by this process's clock, so that clocks of different machines are never compared.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events = Bounded(LIMIT)
        self._system = Bounded(SYSTEM_LIMIT)
        self._heartbeats: dict[int, Pulse] = {}
        self._orders: Orders = {}
        self._decisions: dict[int, int] = {}

    def post(self, event: Event) -> None:
        (self._system if isinstance(event, NodeSample) else self._events).add(event)

    def heartbeat(self, rank: int, progress: int, facts: Facts) -> Orders:
        """Stores a worker's heartbeat and returns the driver's orders."""
        now, before = self._clock(), self._heartbeats.get(rank)
        moved = before["moved"] if before and before["progress"] == progress else now
        self._heartbeats[rank] = {**facts, "progress": progress, "moved": moved, "at": now}
        return self._orders

    def order(self, orders: Orders) -> None:
        self._orders |= orders

    def decide(self, step: int, stop: int) -> None:
        """Decides whether the workers that wait after `step` continue or stop; the first decision for a step stands."""
        self._decisions.setdefault(step, stop)

    def decision(self, step: int) -> int | None:
        """Returns the stop code decided for the workers that wait after `step`; None until there is one.

        An order to stop is a decision too. All workers get the same answer as the first one.
        """
        if step not in self._decisions and self._orders.get("stop"):
            self._decisions[step] = self._orders["stop"]
        return self._decisions.get(step)

    def drain(self) -> tuple[list[Event], dict[int, Pulse], int]:
        """Drains the events since the last call; returns them, every worker's last heartbeat, and how many events were lost.

        A heartbeat's `moved` and `at`: seconds since the worker's last progress, and since the heartbeat itself.
        """
        now = self._clock()
        (events, lost), (system, more) = self._events.take(), self._system.take()
        heartbeats = by_other_clock(self._heartbeats, now)
        return events + system, heartbeats, lost + more


def by_other_clock(heartbeats: dict[int, Pulse], now: float) -> dict[int, Pulse]:
    """Converts the times of heartbeats to ages, or ages to times."""
    return {rank: {**pulse, "moved": now - pulse["moved"], "at": now - pulse["at"]} for rank, pulse in heartbeats.items()}


class Bounded:
    """Keeps the newest events up to a limit, and counts the older ones that were dropped."""

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


def make() -> ActorHandle[MailboxState]:
    """Creates a mailbox actor on this node, the driver's, so that it does not die with a worker's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return cast("ActorHandle[MailboxState]", ray.remote(MailboxState).options(num_cpus=0, scheduling_strategy=here).remote())
