"""Connects workers and driver through a mailbox: a small Ray actor on the driver's node. Training steps never wait for the
mailbox.

Rank 0 posts events (`runs.events`). Every worker sends heartbeats, which show that the worker is alive, and report its progress.
The answer to a heartbeat is the driver's orders:

- `stop`: stop with a code of `stops`
- `dump`: post the stacks of all threads
- `profile`: profile one worker's steps
- `abort`: leave NCCL's collectives, because a worker has failed

A run has one mailbox. Every message carries the number of an attempt. The driver receives events of an earlier attempt, and drops
them. Other messages of an earlier attempt have no effect. A worker of an earlier attempt that still sends heartbeats is ordered
to abort.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple, TypedDict, cast

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from heliostat.runs.events import Event, NodeSample
from heliostat.runs.profile import ProfileRequest

log = logging.getLogger(__name__)

ANSWER_S = 10.0
LIMIT = 100_000  # events; if the driver doesn't drain them in time, the mailbox drops the oldest and reports how many
SYSTEM_LIMIT = 10_000  # node samples; a separate limit, so that many nodes can't crowd out other events


class Facts(TypedDict):
    """Describes a worker in its heartbeat: its process and node, its current step (from 1), and the micro-batches of that step so
    far."""

    pid: int
    node: str
    step: int
    micro: int


class Pulse(Facts):
    """Describes a worker's last heartbeat.

    `at`: when the heartbeat arrived. `moved`: when `progress` last changed. Both times are in seconds.
    """

    progress: int
    moved: float
    at: float


class Orders(TypedDict, total=False):
    """Describes the driver's orders to the workers."""

    stop: int
    dump: bool
    profile: ProfileRequest
    abort: bool


class Drained(NamedTuple):
    """Holds the messages since the last drain.

    `events`: each with the number of its attempt. `heartbeats`: the last one of each rank. `lost`: number of events that were
    dropped at the limit. `stale`: number of messages of earlier attempts that the mailbox dropped, without events.
    """

    events: list[tuple[int, Event]]
    heartbeats: dict[int, Pulse]
    lost: int
    stale: int


def interval(workers: int) -> float:
    """Computes the seconds between two heartbeats of a worker. The mailbox easily answers some hundred heartbeats per second."""
    return max(1.0, workers / 100)


class MailboxState:
    """Holds the mailbox's events, heartbeats, orders, and decisions.

    The driver gets all times as ages in seconds, measured by this process's clock. So clocks of different machines are never
    compared.
    """

    def __init__(self, attempt: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events = Bounded(LIMIT)
        self._system = Bounded(SYSTEM_LIMIT)
        self._stale = 0
        self.begin(attempt)

    def begin(self, attempt: int) -> None:
        """Begins an attempt: forgets the heartbeats, orders, and decisions of the previous attempt."""
        self._attempt = attempt
        self._heartbeats: dict[int, Pulse] = {}
        self._orders: Orders = {}
        self._decisions: dict[int, int] = {}

    def post(self, attempt: int, event: Event) -> None:
        (self._system if isinstance(event, NodeSample) else self._events).add((attempt, event))

    def heartbeat(self, attempt: int, rank: int, progress: int, facts: Facts) -> Orders:
        """Stores a worker's heartbeat and returns the driver's orders. If the attempt has ended, returns the order to abort."""
        if not self._present(attempt):
            return {"abort": True}
        now, before = self._clock(), self._heartbeats.get(rank)
        moved = before["moved"] if before and before["progress"] == progress else now
        self._heartbeats[rank] = {**facts, "progress": progress, "moved": moved, "at": now}
        return self._orders

    def order(self, attempt: int, orders: Orders) -> None:
        if self._present(attempt):
            self._orders |= orders

    def decide(self, attempt: int, step: int, stop: int) -> None:
        """Decides whether the workers that wait after `step` continue or stop.

        If there are several decisions for a step, the first one is used.
        """
        if self._present(attempt):
            self._decisions.setdefault(step, stop)

    def decision(self, attempt: int, step: int) -> int | None:
        """Returns the stop code for the workers that wait after `step`, or None before there is a decision.

        An order to stop is a decision, too. All workers get the same answer as the first worker that asks.
        """
        if not self._present(attempt):
            return None
        if step not in self._decisions and self._orders.get("stop"):
            self._decisions[step] = self._orders["stop"]
        return self._decisions.get(step)

    def drain(self) -> Drained:
        """Returns the messages since the last call, and every worker's last heartbeat.

        A heartbeat's `moved` is the seconds since the worker's last progress; `at` is the seconds since the heartbeat.
        """
        now = self._clock()
        (events, lost), (system, more) = self._events.take(), self._system.take()
        heartbeats = by_other_clock(self._heartbeats, now)
        stale, self._stale = self._stale, 0
        return Drained(events + system, heartbeats, lost + more, stale)

    def _present(self, attempt: int) -> bool:
        """Checks whether a message belongs to the current attempt, and counts the messages that don't."""
        self._stale += attempt != self._attempt
        return attempt == self._attempt


def by_other_clock(heartbeats: dict[int, Pulse], now: float) -> dict[int, Pulse]:
    """Converts the times of heartbeats to ages, or ages to times, in seconds. `now`: the time of this process's clock."""
    return {rank: {**pulse, "moved": now - pulse["moved"], "at": now - pulse["at"]} for rank, pulse in heartbeats.items()}


class Bounded:
    """Keeps the newest events up to a limit, and counts the older events that were dropped."""

    def __init__(self, limit: int) -> None:
        self._kept: deque[tuple[int, Event]] = deque(maxlen=limit)
        self._added = 0

    def add(self, event: tuple[int, Event]) -> None:
        self._kept.append(event)
        self._added += 1

    def take(self) -> tuple[list[tuple[int, Event]], int]:
        kept, lost = list(self._kept), self._added - len(self._kept)
        self._kept.clear()
        self._added = 0
        return kept, lost


@dataclass(frozen=True)
class AttemptMailbox:
    """Sends messages of one attempt to the run's mailbox, with the attempt's number. Never waits for an answer."""

    actor: ActorHandle[MailboxState]
    attempt: int

    def post(self, event: Event) -> None:
        self.actor.post.remote(self.attempt, event)

    def heartbeat(self, rank: int, progress: int, facts: Facts) -> ray.ObjectRef[Orders]:
        """Sends a worker's heartbeat. Returns the Ray reference to the driver's orders."""
        return self.actor.heartbeat.remote(self.attempt, rank, progress, facts)

    def order(self, orders: Orders) -> None:
        self.actor.order.remote(self.attempt, orders)

    def decide(self, step: int, stop: int) -> None:
        self.actor.decide.remote(self.attempt, step, stop)

    def decision(self, step: int) -> ray.ObjectRef[int | None]:
        """Returns the reference to the decision for a step (`MailboxState.decision`)."""
        return self.actor.decision.remote(self.attempt, step)

    def drain(self) -> ray.ObjectRef[Drained]:
        """Returns the reference to the drained messages, which may belong to any attempt."""
        return self.actor.drain.remote()


class RunMailbox:
    """Owns the mailbox actor of a run. Leaving `with RunMailbox() as mailbox:` ends the actor."""

    def __init__(self) -> None:
        self._actor: ActorHandle[MailboxState] | None = None

    def __enter__(self) -> RunMailbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._actor:
            ray.kill(self._actor)

    def begin(self, attempt: int) -> AttemptMailbox:
        """Begins an attempt. Creates an actor if there is none, or if the old actor no longer answers."""
        if self._actor:
            try:
                ray.get(self._actor.begin.remote(attempt), timeout=ANSWER_S)
            except ray.exceptions.RayError as e:
                log.debug("restarting the mailbox, because it doesn't answer: %s", e)
                ray.kill(self._actor)
                self._actor = None
        self._actor = self._actor or _make(attempt)
        return AttemptMailbox(self._actor, attempt)


def _make(attempt: int) -> ActorHandle[MailboxState]:
    """Creates a mailbox actor on the driver's node, so that the actor doesn't die with a worker's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(MailboxState).options(num_cpus=0, scheduling_strategy=here)
    return cast("ActorHandle[MailboxState]", mailbox.remote(attempt))
