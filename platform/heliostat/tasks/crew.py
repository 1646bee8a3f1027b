"""Keeps the tasks of one kind under way on Ray: starts those again that fail, while the others continue.

What a person must change (exit code 2) ends the run at once, and no error that heliostat raises on purpose is worth another run.
A task that raises another error has `TRIES` runs. One whose process or node dies has `LOST`, counted from the last document that
was found to be at fault (`care`). After `FAILED` tasks that used them up, or too many documents that crashed, no other task is
started. Those that are under way end and are recorded, and the first error is raised.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayError, RayTaskError

from heliostat.errors import innermost, unwrapped
from heliostat.storage.retries import Backoff
from heliostat.tasks import care, shipping
from heliostat.tasks.care import Trouble
from heliostat.tasks.pool import ActorPool, TaskFunction
from heliostat.tasks.shipping import NotHereError, Shipment
from heliostat.tasks.work import Work
from heliostat.text import printable

log = logging.getLogger(__name__)

TRIES, LOST, FAILED = 3, 8, 3
PAUSE = Backoff(0.5, 10.0)  # before a task is run again whose process died: what is short of memory stays so for a while
LOOK_S = 10.0  # between looks at the cluster's nodes
AWAY_S = 0.5  # between looks at actors that are all lost, and at copies that tasks wait for
ENDING_S = 2.0  # for tasks to end by themselves after the run is given up
END_S = 60.0  # and when they are cancelled


@dataclass(frozen=True)
class Task:
    """Describes a task: the key that its result follows from, and what its function is called with."""

    key: str
    arguments: dict[str, Any]
    shared: dict[str, object] = field(default_factory=dict)
    """Further arguments, each from `Flow.share`: what is large and the same for many tasks travels to a node once."""
    bytes: int = 0
    """That it reads, about: for the progress."""
    careful: bool = False
    """Whether its function takes `care`, where it is run again."""
    before: str = ""
    """The key that earlier versions gave to the same task, whose record counts too."""


class Flowing(Protocol):
    """Lists what a crew reads of the flow that it works for (`flow.Flow`)."""

    work: Work
    labels: dict[str, str]
    crashed: int
    passed: int
    name: str

    def nodes(self, resource: str = "CPU") -> list[int]: ...
    def memory_each(self, cpus: int = 1) -> int | None: ...
    def log_short_memory(self, cpus: int) -> None: ...


@dataclass(eq=False)
class Started:
    """Describes a task that is under way: its number among those of its kind, its failures, and when it is started again."""

    number: int
    task: Task
    trouble: Trouble = field(default_factory=Trouble)
    due: float = 0.0
    offered: set[Shipment] = field(default_factory=set)
    """What its node lacked, and the driver has copied to the work folder."""
    copy: Future[None] | None = None
    """Such a copy, which may be under way: the task is started again after it."""

    @property
    def waits(self) -> bool:
        return self.copy is not None and not self.copy.done()


class Crew:
    """Keeps tasks under way, in a pool of `size` actors, if any, else as tasks of `cpus` CPUs each."""

    def __init__(self, flow: Flowing, kind: str, execute: Any, function: TaskFunction, cpus: int, size: int,
                 gpus: float) -> None:  # fmt: skip
        self.flow, self.kind, self.execute, self.function, self.cpus = flow, kind, execute, function, cpus
        self.work = Work(flow.work.location)  # without what was looked up
        selector = flow.labels or None
        self.pool = ActorPool(execute, size, num_cpus=cpus, num_gpus=gpus, label_selector=selector) if size else None
        self.remote: Any = self.pool or ray.remote(execute)
        self.under_way: dict[Any, Started] = {}
        self.later: list[Started] = []
        self.copies: dict[Shipment, Future[None]] = {}
        self.failed: list[BaseException] = []
        self.stopped = False
        self.size, self.looked, self.room, self.last, self.alone = size, -LOOK_S, 0, "", False
        self.memory: int | None = None  # bytes that each task requests

    @property
    def full(self) -> bool:
        """Tells whether twice as many tasks are under way as have room; nodes that come and go are looked at now and then."""
        self._look()
        if self.pool and not self.pool.ready:
            return True
        return len(self.under_way) + len(self.later) >= self.room

    @property
    def busy(self) -> bool:
        return bool(self.under_way or self.later)

    def start(self, started: Started) -> None:
        """Starts a task; raises what went wrong with the copy that it waited for."""
        if started.copy:
            started.copy.result()
        task, trouble = started.task, started.trouble
        shared = dict(task.shared)
        if task.careful and (trouble.count or trouble.crashed):
            shared["care"] = trouble.care(self.work.note(self.kind, task.key))
        remote = self.remote
        if self.pool is None:
            remote = remote.options(
                num_cpus=self.cpus, memory=self.memory, max_retries=0, label_selector=self.flow.labels or None, name=self.kind
            )
        reference = remote.remote(self.work, self.flow.name, self.kind, task.key, self.function, task.arguments, **shared)
        self.under_way[reference] = started

    def finished(self) -> Iterator[tuple[Started, dict[str, Any]]]:
        """Waits for a task, and yields it with its record if it has finished."""
        self._check()
        self._look()
        wait = self._start_due()
        if not self.under_way:
            time.sleep(wait)
            return
        ready, _ = ray.wait(list(self.under_way), num_returns=1, timeout=wait)
        for reference in ready:
            started = self.under_way.pop(reference)
            try:
                record = ray.get(reference)
            except Exception as e:  # noqa: BLE001 - judged
                if self.pool:
                    (self.pool.lost if _is_lost(e) else self.pool.ended)(reference)
                self._judge(started, e)
                continue
            if self.pool:
                self.pool.ended(reference)
            if started.trouble.attempt:
                self.work.note(self.kind, started.task.key).delete()
            examples = record.get("examples", {})
            if crashed := examples.get(care.CRASHED) or examples.get(care.UNREAD):
                self.last = crashed[0]
            yield started, record

    def conclude(self) -> None:
        """Raises the error of the first task that failed for good, if one did."""
        self._check()
        if not self.failed:
            return
        log.warning("%s: %d tasks failed. The work of the others is recorded, and the next start resumes there",
                    self.kind, len(self.failed))  # fmt: skip
        with unwrapped():
            raise self.failed[0]

    def end(self) -> None:
        """Ends what is still under way."""
        if self.pool:
            self.pool.end()
        _end(list(self.under_way))

    def _start_due(self) -> float:
        """Starts the tasks whose pause or copy is over; returns the seconds until another one is looked at, or the nodes are."""
        if self.pool and not self.pool.ready:
            return AWAY_S
        now, later = time.monotonic(), self.later
        self.later = [one for one in later if one.due > now or one.waits]
        for started in later:
            if started not in self.later:
                self.start(started)
        return max(0.0, min([LOOK_S, *(AWAY_S if one.waits else one.due - now for one in self.later)]))

    def _copy(self, shipment: Shipment) -> Future[None]:
        """Copies what a node lacks to the work folder, in a thread: other tasks end and start meanwhile."""
        if (known := self.copies.get(shipment)) and not known.done():
            return known
        copy = self.copies[shipment] = Future[None]()

        def run() -> None:
            try:
                shipping.offer(self.work.spill, shipment)
            except Exception as e:  # noqa: BLE001 (raised where the task is started again)
                copy.set_exception(e)
            else:
                copy.set_result(None)

        threading.Thread(target=run, name="copy", daemon=True).start()
        return copy

    def _judge(self, started: Started, error: Exception) -> None:
        """Decides whether a task that failed is run again; raises what a person must change."""
        cause, trouble, task = innermost(error), started.trouble, started.task
        if isinstance(cause, NotHereError) and not self.stopped and cause.shipment not in started.offered:
            started.copy = self._copy(cause.shipment)
            started.offered.add(cause.shipment)
            self.later.append(started)
            return
        if cause is not None and cause.exit_code == 2:
            with unwrapped():
                raise error
        lost = _is_lost(error)
        trouble.count += 1
        if lost and task.careful and (crash := trouble.learn(self.work.note(self.kind, task.key), error)):
            self.last = crash.id
            log.warning(
                "%s: %s crashes its process at %s, so heliostat leaves it out (%s)",
                self.kind,
                printable(crash.id),
                crash.stage,
                crash.detail,
            )
            if self.pool:  # what waited after it in its actor has died with it each time
                for other in [*self.under_way.values(), *self.later]:
                    other.trouble.count = min(other.trouble.count, 1)
        if self.stopped or cause is not None or trouble.count >= (LOST if lost else TRIES):
            self.failed.append(error)
            self.stopped |= len(self.failed) >= FAILED
            return
        log.warning("%s: a task failed (%s). Running it again", self.kind, care.last_line(error))
        started.due = time.monotonic() + (PAUSE.wait(trouble.count) if lost and trouble.count else 0.0)
        self.later.append(started)

    def _check(self) -> None:
        """Stops if more documents have crashed than may."""
        under_way = sum(len(one.trouble.crashed) for one in [*self.under_way.values(), *self.later])
        crashed = self.flow.crashed + under_way
        if crashed > care.most(self.flow.passed) and not self.stopped:
            self.stopped = True
            self.failed.insert(0, care.too_many(crashed, f"for example {printable(self.last)!r}"))

    def _look(self) -> None:
        """Looks at the nodes, now and then: how many tasks have room, and whether one has the CPUs that a task requests."""
        if time.monotonic() - self.looked < LOOK_S:
            return
        self.looked, nodes = time.monotonic(), self.flow.nodes()
        self.memory = self.flow.memory_each(max(1, min(self.cpus, max(nodes, default=0))))
        if not any(nodes):
            label = f" with the labels {self.flow.labels}" if self.flow.labels else ""
            log.log(
                logging.DEBUG if self.alone else logging.WARNING,
                "%s: no node has CPUs%s, so tasks wait for one",
                self.kind,
                label,
            )
        elif self.pool is None and max(nodes) < self.cpus:
            self._request(max(nodes))
        elif self.pool is None:
            self.flow.log_short_memory(self.cpus)
        self.alone = not any(nodes)
        self.room = 2 * self.size if self.pool else max(2, 2 * sum(nodes) // self.cpus)

    def _request(self, cpus: int) -> None:
        """Starts tasks again with fewer CPUs each, after the nodes have gone that had so many."""
        self.cpus = cpus
        _, waiting = ray.wait(list(self.under_way), num_returns=len(self.under_way), timeout=0) if self.under_way else ([], [])
        for reference in waiting:
            started = self.under_way.pop(reference)
            ray.cancel(reference)
            self.start(started)


def _is_lost(error: Exception) -> bool:
    """Tells whether a task failed because its process or node died, and not by an error of its own."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def _end(references: list[Any]) -> None:
    """Ends tasks that are at work, so that nothing is written after an error was reported.

    What is about to end is let end: Ray aborts this process if a task that it is just completing is cancelled.
    """
    _, working = ray.wait(references, num_returns=len(references), timeout=ENDING_S) if references else ([], [])
    for reference in working:
        ray.cancel(reference)
    if working:
        _, left = ray.wait(working, num_returns=len(working), timeout=END_S)
        if left:
            log.warning("%d tasks didn't end within %.0f s", len(left), END_S)
