"""Runs the tasks of one kind on Ray, and retries failed tasks while the others continue.

An error that a person must fix (exit code 2) ends the run at once. Other errors that heliostat raises on purpose aren't retried.
A task that raises any other error runs up to `TRIES` times. A task whose process or node dies runs up to `LOST` times. The count
begins again when the task leaves out a document (`care`). After `FAILED` failed tasks, or too many crashed documents, no further
task starts. Tasks that have started continue to their end and are recorded. Then the crew raises the first error.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from heliostat.errors import innermost, unwrapped
from heliostat.storage.retries import Backoff
from heliostat.tasks import care, shipping
from heliostat.tasks.care import Trouble
from heliostat.tasks.clusters import Cluster, Task, TaskKind
from heliostat.tasks.ray_cluster import END_S, is_lost
from heliostat.tasks.shipping import NotHereError, Shipment
from heliostat.tasks.work import Work
from heliostat.text import printable

log = logging.getLogger(__name__)

TRIES, LOST, FAILED = 3, 8, 3
PAUSE = Backoff(0.5, 10.0)  # pause before a task runs again after its process died, because a lack of memory lasts for a while
LOOK_S = 10.0  # seconds between checks of the cluster's nodes
AWAY_S = 0.5  # seconds between checks for a live actor if all are lost, and of copies that tasks wait for


class Flowing(Protocol):
    """Declares the fields and methods of `flow.Flow` that `Crew` uses."""

    work: Work
    labels: dict[str, str]
    crashed: int
    passed: int
    name: str
    cluster: Cluster

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
    """Runs the tasks of one kind: in actors, or each with the kind's number of CPUs."""

    def __init__(self, flow: Flowing, kind: TaskKind) -> None:
        self.flow, self.kind, self.cpus, self.size = flow, kind.name, kind.cpus, kind.actors
        self.work = Work(flow.work.location)  # without the cached list of files
        self.cluster, self.executor = flow.cluster, flow.cluster.executor(kind)
        self.under_way: dict[Any, Started] = {}
        self.later: list[Started] = []
        self.copies: dict[Shipment, Future[None]] = {}
        self.failed: list[BaseException] = []
        self.stopped = False
        self.looked, self.room, self.last, self.alone = -LOOK_S, 0, "", False
        self.memory: int | None = None  # bytes that each task requests
        self.crashed = 0  # documents that the tasks under way leave out; a look at each task would take too long

    @property
    def full(self) -> bool:
        """Checks whether the crew accepts no more tasks: twice as many tasks have started as can run at once, or all actors are
        lost."""
        self._look()
        if not self.executor.ready:
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
        reference = self.executor.start((self.work, self.flow.name, self.kind), task, shared, self.cpus, self.memory)
        self.under_way[reference] = started

    def finished(self) -> Iterator[tuple[Started, dict[str, Any]]]:
        """Waits for a task to end. Yields (the task, its record) if the task succeeded. Otherwise decides whether the task runs
        again."""
        self._check()
        self._look()
        wait = self._start_due()
        if not self.under_way:
            self.cluster.sleep(wait)
            return
        for reference in self.executor.ended(list(self.under_way), wait):
            started = self.under_way.pop(reference)
            try:
                record = self.executor.record(reference)
            except Exception as e:  # noqa: BLE001 - judged
                self._judge(started, e)
                continue
            self.crashed -= len(started.trouble.crashed)
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
        """Ends the executor, and cancels the tasks that are still running."""
        if left := self.executor.end(list(self.under_way)):
            log.warning(
                "%d canceled tasks didn't end within %.0f s, and may still run. List tasks with: ray list tasks", left, END_S
            )

    def _start_due(self) -> float:
        """Starts the tasks whose pause or copy has ended. Returns the seconds until the next check of tasks and nodes."""
        if not self.executor.ready:
            return AWAY_S
        now, later = self.cluster.now(), self.later
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
        lost = is_lost(error)
        trouble.count += 1
        if lost and task.careful and (crash := trouble.learn(self.work.note(self.kind, task.key), error)):
            self.last = crash.id
            self.crashed += 1
            log.warning(
                "%s: document %s crashes the task's process at stage %s, so heliostat leaves this document out (%s)",
                self.kind,
                printable(crash.id),
                crash.stage,
                crash.detail,
            )
            if self.size:  # tasks that waited for the same actor died with it each time
                for other in [*self.under_way.values(), *self.later]:
                    other.trouble.count = min(other.trouble.count, 1)
        if self.stopped or cause is not None or trouble.count >= (LOST if lost else TRIES):
            self.failed.append(error)
            self.crashed -= len(trouble.crashed)  # no longer under way
            self.stopped |= len(self.failed) >= FAILED
            return
        log.warning("%s: a task failed (%s). Running the task again", self.kind, care.last_line(error))
        started.due = self.cluster.now() + (PAUSE.wait(trouble.count) if lost and trouble.count else 0.0)
        self.later.append(started)

    def _check(self) -> None:
        """Stops the crew if too many documents have crashed."""
        crashed = self.flow.crashed + self.crashed
        if crashed > care.most(self.flow.passed) and not self.stopped:
            self.stopped = True
            self.failed.insert(0, care.too_many(crashed, f"for example {printable(self.last)!r}"))

    def _look(self) -> None:
        """Checks the cluster's nodes every LOOK_S seconds: how many tasks can run at once, and whether any node has as many CPUs
        as a task requests."""
        if self.cluster.now() - self.looked < LOOK_S:
            return
        self.looked, nodes = self.cluster.now(), self.flow.nodes()
        self.memory = self.flow.memory_each(max(1, min(self.cpus, max(nodes, default=0))))
        if not any(nodes):
            label = f" and the labels {self.flow.labels}" if self.flow.labels else ""
            log.log(
                logging.DEBUG if self.alone else logging.WARNING,
                "%s: tasks wait for a node with CPUs%s. The cluster has no such node now. Start such a node, or change `labels`",
                self.kind,
                label,
            )
        elif not self.size and max(nodes) < self.cpus:
            self._request(max(nodes))
        elif not self.size:
            self.flow.log_short_memory(self.cpus)
        self.alone = not any(nodes)
        self.room = 2 * self.size if self.size else max(2, 2 * sum(nodes) // self.cpus)

    def _request(self, cpus: int) -> None:
        """Restarts waiting tasks with fewer CPUs each, because no node has the number of CPUs that these tasks requested."""
        self.cpus = cpus
        for reference in self.executor.withdraw(list(self.under_way)):
            self.start(self.under_way.pop(reference))
