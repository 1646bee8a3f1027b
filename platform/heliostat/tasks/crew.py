"""Runs the tasks of one kind on Ray, and retries failed tasks while the others continue.

An error that a person must fix (exit code 2) ends the run at once. Other errors that heliostat raises on purpose aren't retried.
A task that raises any other error runs up to `TRIES` times. A task whose process or node dies runs up to `LOST` times. The count
begins again when the task leaves out a document (`care`). After `FAILED` failed tasks, or too many crashed documents, no further
task starts. Tasks that have started continue to their end and are recorded. Then the crew raises the first error.
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
PAUSE = Backoff(0.5, 10.0)  # pause before a task runs again after its process died, because a lack of memory lasts for a while
LOOK_S = 10.0  # seconds between checks of the cluster's nodes
AWAY_S = 0.5  # seconds between checks for a live actor if all are lost, and of copies that tasks wait for
ENDING_S = 2.0  # seconds for tasks to end by themselves after the run has failed
END_S = 60.0  # seconds for tasks to end after they are canceled


@dataclass(frozen=True)
class Task:
    """Describes a task: the key of its record, and the arguments of its function."""

    key: str
    arguments: dict[str, Any]
    shared: dict[str, object] = field(default_factory=dict)
    """Further arguments, each from `Flow.share`. A large value that many tasks share is sent to a node only once."""
    bytes: int = 0
    """Bytes that the task reads, approximately, for the progress line."""
    careful: bool = False
    """Whether the function takes an argument `care` when the task runs again."""
    before: str = ""
    """Key of the same task in earlier versions of heliostat. If a record has this key, the task is finished."""


class Flowing(Protocol):
    """Declares the fields and methods of `flow.Flow` that `Crew` uses."""

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
    """Describes a task that has started: its number among the tasks of its kind, its failures, and the time to start it again."""

    number: int
    task: Task
    trouble: Trouble = field(default_factory=Trouble)
    due: float = 0.0
    offered: set[Shipment] = field(default_factory=set)
    """Shipments (files) that the task's node lacked, and that the driver copied to the work folder."""
    copy: Future[None] | None = None
    """The last copy of a shipment to the work folder. The task starts again when this copy is complete."""

    @property
    def waits(self) -> bool:
        return self.copy is not None and not self.copy.done()


class Crew:
    """Runs tasks in a pool of `size` actors. If `size` is 0, runs the tasks as Ray tasks of `cpus` CPUs each."""

    def __init__(self, flow: Flowing, kind: str, execute: Any, function: TaskFunction, cpus: int, size: int,
                 gpus: float) -> None:  # fmt: skip
        self.flow, self.kind, self.execute, self.function, self.cpus = flow, kind, execute, function, cpus
        self.work = Work(flow.work.location)  # without the cached list of files
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
        """Checks whether the crew accepts no more tasks: twice as many tasks have started as can run at once, or all actors are
        lost."""
        self._look()
        if self.pool and not self.pool.ready:
            return True
        return len(self.under_way) + len(self.later) >= self.room

    @property
    def busy(self) -> bool:
        return bool(self.under_way or self.later)

    def start(self, started: Started) -> None:
        """Starts a task. If the task waited for a copy that failed, raises the copy's error."""
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
        """Waits for a task to end. Yields (the task, its record) if the task succeeded. Otherwise decides whether the task runs
        again."""
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
        """Raises the error of the first task that failed permanently, if there is one."""
        self._check()
        if not self.failed:
            return
        log.warning("%s: %d tasks failed. The work of the other tasks is recorded. To continue from it, run the command again",
                    self.kind, len(self.failed))  # fmt: skip
        with unwrapped():
            raise self.failed[0]

    def end(self) -> None:
        """Ends the pool, and cancels the tasks that are still running."""
        if self.pool:
            self.pool.end()
        _end(list(self.under_way))

    def _start_due(self) -> float:
        """Starts the tasks whose pause or copy has ended. Returns the seconds until the next check of tasks and nodes."""
        if self.pool and not self.pool.ready:
            return AWAY_S
        now, later = time.monotonic(), self.later
        self.later = [one for one in later if one.due > now or one.waits]
        for started in later:
            if started not in self.later:
                self.start(started)
        return max(0.0, min([LOOK_S, *(AWAY_S if one.waits else one.due - now for one in self.later)]))

    def _copy(self, shipment: Shipment) -> Future[None]:
        """Copies a shipment (files that a node needs) to the work folder, in a thread. So other tasks can end and start during
        the copy. Returns the copy's future."""
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
        """Decides whether a failed task runs again. Raises the task's error if a person must fix its cause."""
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
                "%s: document %s crashes the task's process at stage %s, so heliostat leaves this document out (%s)",
                self.kind,
                printable(crash.id),
                crash.stage,
                crash.detail,
            )
            if self.pool:  # tasks that waited for the same actor died with it each time
                for other in [*self.under_way.values(), *self.later]:
                    other.trouble.count = min(other.trouble.count, 1)
        if self.stopped or cause is not None or trouble.count >= (LOST if lost else TRIES):
            self.failed.append(error)
            self.stopped |= len(self.failed) >= FAILED
            return
        log.warning("%s: a task failed (%s). Running the task again", self.kind, care.last_line(error))
        started.due = time.monotonic() + (PAUSE.wait(trouble.count) if lost and trouble.count else 0.0)
        self.later.append(started)

    def _check(self) -> None:
        """Stops the crew if too many documents have crashed."""
        under_way = sum(len(one.trouble.crashed) for one in [*self.under_way.values(), *self.later])
        crashed = self.flow.crashed + under_way
        if crashed > care.most(self.flow.passed) and not self.stopped:
            self.stopped = True
            self.failed.insert(0, care.too_many(crashed, f"for example {printable(self.last)!r}"))

    def _look(self) -> None:
        """Checks the cluster's nodes every LOOK_S seconds: how many tasks can run at once, and whether any node has as many CPUs
        as a task requests."""
        if time.monotonic() - self.looked < LOOK_S:
            return
        self.looked, nodes = time.monotonic(), self.flow.nodes()
        self.memory = self.flow.memory_each(max(1, min(self.cpus, max(nodes, default=0))))
        if not any(nodes):
            label = f" and the labels {self.flow.labels}" if self.flow.labels else ""
            log.log(
                logging.DEBUG if self.alone else logging.WARNING,
                "%s: tasks wait for a node with CPUs%s. The cluster has no such node now. Start such a node, or change `labels`",
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
        """Restarts waiting tasks with fewer CPUs each, because no node has the number of CPUs that these tasks requested."""
        self.cpus = cpus
        _, waiting = ray.wait(list(self.under_way), num_returns=len(self.under_way), timeout=0) if self.under_way else ([], [])
        for reference in waiting:
            started = self.under_way.pop(reference)
            ray.cancel(reference)
            self.start(started)


def _is_lost(error: Exception) -> bool:
    """Returns whether a task failed because its process or node died, not because it raised an error."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def _end(references: list[Any]) -> None:
    """Cancels running tasks, so that these tasks write nothing after an error was reported.

    First waits ENDING_S seconds for tasks to end, because Ray aborts this process if a task is canceled while it completes.
    """
    _, working = ray.wait(references, num_returns=len(references), timeout=ENDING_S) if references else ([], [])
    for reference in working:
        ray.cancel(reference)
    if working:
        _, left = ray.wait(working, num_returns=len(working), timeout=END_S)
        if left:
            log.warning(
                "%d canceled tasks didn't end within %.0f s, and may still run. List tasks with: ray list tasks", len(left), END_S
            )
