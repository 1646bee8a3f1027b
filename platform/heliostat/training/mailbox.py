"""Connects workers and driver through a mailbox: a small Ray actor on the driver's node, which the step path never waits for.

Rank 0 posts events (`runs.events`). Every worker's heartbeat reports that it is alive and how far it is, and returns what
the driver has ordered: `stop` (a code of `stops`), `dump` (post the stacks of all threads), `profile` (of one worker's steps)
and `abort` (come back from NCCL's collectives: a worker has failed).

A run has one mailbox. All that is sent to it carries the number of an attempt. Events of an earlier attempt reach the driver,
which drops them. Its other messages change nothing, and a worker that still sends heartbeats for it is ordered to abort.
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


class Drained(NamedTuple):
    """Holds what was drained: events, each with the number of its attempt; the last heartbeats by rank; how many events were
    lost; and how many other messages of earlier attempts were dropped."""

    events: list[tuple[int, Event]]
    heartbeats: dict[int, Pulse]
    lost: int
    stale: int


def interval(workers: int) -> float:
    """Computes the seconds between two heartbeats of a worker: the mailbox easily answers some hundred a second."""
    return max(1.0, workers / 100)


class MailboxState:
    """Holds the mailbox's events, heartbeats, orders and decisions.

    All times are ages, in seconds by this process's clock, so that clocks of different machines are never compared.
    """

    def __init__(self, attempt: int = 0, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events = Bounded(LIMIT)
        self._system = Bounded(SYSTEM_LIMIT)
        self._stale = 0
        self.begin(attempt)

    def begin(self, attempt: int) -> None:
        """Begins an attempt: heartbeats, orders, and decisions of the one before are gone."""
        self._attempt = attempt
        self._heartbeats: dict[int, Pulse] = {}
        self._orders: Orders = {}
        self._decisions: dict[int, int] = {}

    def post(self, attempt: int, event: Event) -> None:
        (self._system if isinstance(event, NodeSample) else self._events).add((attempt, event))

    def heartbeat(self, attempt: int, rank: int, progress: int, facts: Facts) -> Orders:
        """Stores a worker's heartbeat and returns the driver's orders; the order to abort, if the attempt has ended."""
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
        """Decides whether the workers that wait after `step` continue or stop; the first decision for a step stands."""
        if self._present(attempt):
            self._decisions.setdefault(step, stop)

    def decision(self, attempt: int, step: int) -> int | None:
        """Returns the stop code decided for the workers that wait after `step`; None until there is one.

        An order to stop is a decision too. All workers get the same answer as the first one.
        """
        if not self._present(attempt):
            return None
        if step not in self._decisions and self._orders.get("stop"):
            self._decisions[step] = self._orders["stop"]
        return self._decisions.get(step)

    def drain(self) -> Drained:
        """Drains what came since the last call, and every worker's last heartbeat.

        A heartbeat's `moved` and `at`: seconds since the worker's last progress, and since the heartbeat itself.
        """
        now = self._clock()
        (events, lost), (system, more) = self._events.take(), self._system.take()
        heartbeats = by_other_clock(self._heartbeats, now)
        stale, self._stale = self._stale, 0
        return Drained(events + system, heartbeats, lost + more, stale)

    def _present(self, attempt: int) -> bool:
        """Reports whether a message is of the present attempt; counts those that are not."""
        self._stale += attempt != self._attempt
        return attempt == self._attempt


def by_other_clock(heartbeats: dict[int, Pulse], now: float) -> dict[int, Pulse]:
    """Converts the times of heartbeats to ages, or ages to times."""
    return {rank: {**pulse, "moved": now - pulse["moved"], "at": now - pulse["at"]} for rank, pulse in heartbeats.items()}


class Bounded:
    """Keeps the newest events up to a limit, and counts the older ones that were dropped."""

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
    """Sends messages of one attempt, with its number, to the run's mailbox; never waits."""

    actor: ActorHandle[MailboxState]
    attempt: int

    def post(self, event: Event) -> None:
        self.actor.post.remote(self.attempt, event)

    def heartbeat(self, rank: int, progress: int, facts: Facts) -> ray.ObjectRef[Orders]:
        """Returns the reference to the driver's orders."""
        return self.actor.heartbeat.remote(self.attempt, rank, progress, facts)

    def order(self, orders: Orders) -> None:
        self.actor.order.remote(self.attempt, orders)

    def decide(self, step: int, stop: int) -> None:
        self.actor.decide.remote(self.attempt, step, stop)

    def decision(self, step: int) -> ray.ObjectRef[int | None]:
        """Returns the reference to the decision for a step (`MailboxState.decision`)."""
        return self.actor.decision.remote(self.attempt, step)

    def drain(self) -> ray.ObjectRef[Drained]:
        """Returns the reference to what has come, of whichever attempt."""
        return self.actor.drain.remote()


class RunMailbox:
    """Keeps the mailbox of a run; `with RunMailbox() as mailbox:` ends it."""

    def __init__(self) -> None:
        self._actor: ActorHandle[MailboxState] | None = None

    def __enter__(self) -> RunMailbox:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._actor:
            ray.kill(self._actor)

    def begin(self, attempt: int) -> AttemptMailbox:
        """Begins an attempt. Makes an actor if there is none, or the one before doesn't answer any more."""
        if self._actor:
            try:
                ray.get(self._actor.begin.remote(attempt), timeout=ANSWER_S)
            except ray.exceptions.RayError as e:
                log.debug("starting the mailbox again: %s", e)
                ray.kill(self._actor)
                self._actor = None
        self._actor = self._actor or _make(attempt)
        return AttemptMailbox(self._actor, attempt)


def _make(attempt: int) -> ActorHandle[MailboxState]:
    """Creates a mailbox actor on this node, the driver's, so that it does not die with a worker's node."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(MailboxState).options(num_cpus=0, scheduling_strategy=here)
    return cast("ActorHandle[MailboxState]", mailbox.remote(attempt))
