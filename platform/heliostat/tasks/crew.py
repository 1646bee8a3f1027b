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
from typing import Any, Protocol

from heliostat.errors import innermost, unwrapped
from heliostat.storage.retries import Backoff
from heliostat.tasks import care, shipping
from heliostat.tasks.calls import GROUPS, MEASURED, MOST_COPIES, Call, CallSlots, CallTimes, Started, copied
from heliostat.tasks.clusters import Cluster, Executor, TaskKind
from heliostat.tasks.ray_tasks import END_S, is_lost
from heliostat.tasks.shipping import NotHereError, Shipment
from heliostat.tasks.work import Work
from heliostat.text import printable

log = logging.getLogger(__name__)

TRIES, LOST, FAILED = 3, 8, 3
PAUSE = Backoff(0.5, 10.0)  # pause before a task runs again after its process died, because a lack of memory lasts for a while
LOOK_S = 10.0  # seconds between checks of the cluster's nodes
AWAY_S = 0.5  # seconds between checks for a live actor if all are lost, and of copies that tasks wait for
LATE_LOOK_S = 1.0  # seconds between checks for calls that are late
MEASURE_S = 0.5  # seconds between checks for the first calls that have ended


class Flowing(Protocol):
    """Declares the fields and methods of `flow.Flow` that `Crew` uses."""

    work: Work
    labels: dict[str, str]
    crashed: int
    passed: int
    name: str
    cluster: Cluster
    repeated: list[tuple[Executor, Any]]

    def nodes(self, resource: str = "CPU") -> list[int]: ...
    def memory_each(self, cpus: int = 1, reads: bool = False) -> int | None: ...
    def at_once(self, cpus: int, reads: bool = False) -> int: ...
    def log_short_memory(self, cpus: int, reads: bool = False) -> None: ...


class Crew:
    """Runs the tasks of one kind: in actors, or each with the kind's number of CPUs."""

    def __init__(self, flow: Flowing, kind: TaskKind) -> None:
        self.flow, self.kind, self.cpus, self.size, self.reads = flow, kind.name, kind.cpus, kind.actors, kind.reads
        self.work = flow.work.of_tasks()
        self.cluster, self.executor = flow.cluster, flow.cluster.executor(kind)
        self.under_way: dict[Any, Call] = {}
        self.groups: dict[object, list[Started]] = {}  # tasks that the next calls run, by the tasks' shared arguments
        self.later: list[Started] = []
        self.copies: dict[Shipment, Future[None]] = {}
        self.failed: list[BaseException] = []
        self.stopped = self.complete = False
        self.looked, self.looked_late, self.room, self.last = -LOOK_S, 0.0, 0, ""
        self.measured = self.cluster.now()
        self.alone = self.several = False
        self.memory: int | None = None  # bytes that each task requests
        self.crashed = 0  # documents that the tasks under way leave out; a look at each task would take too long
        self.times, self.slots = CallTimes(self.executor.start_s), CallSlots()

    @property
    def full(self) -> bool:
        """Checks whether the crew accepts no more tasks: twice as many calls have started as can run at once, or all actors are
        lost."""
        self._look()
        if not self.executor.ready:
            return True
        return len(self.under_way) + len(self.later) >= self.room

    @property
    def unmeasured(self) -> bool:
        """Checks whether it is time to look for calls that have ended, because too few tasks have ended to group the others. On
        many CPUs, the driver starts calls for half a minute before the crew is full."""
        few = not self.complete and self.times.tasks < MEASURED
        return few and bool(self.under_way) and self.cluster.now() - self.measured > MEASURE_S

    @property
    def busy(self) -> bool:
        return bool(self.under_way or self.later)

    def add(self, started: Started, left: int) -> None:
        """Starts a task, or adds it to the tasks with the same shared arguments that the next call runs. `left`: tasks that
        follow."""
        group = self.groups.pop(started.shared, [])
        if group and not self._has_room(group, started, left):
            self._call(Call(group, self.cpus))
            group = []
        fits = self._has_room(group, started, left)
        group.append(started)
        if self.size or not fits:
            self._call(Call(group, self.cpus))
            return
        self.groups[started.shared] = group
        if len(self.groups) > GROUPS:
            self._call(Call(self.groups.pop(next(iter(self.groups))), self.cpus))

    def _has_room(self, group: list[Started], started: Started, left: int) -> bool:
        return self.times.has_room(group, started, left, self.slots.count)

    def completed(self) -> None:
        """Starts the last groups. After this call, no tasks are added."""
        self.complete = True
        for group in self.groups.values() if not self.stopped else ():
            self._call(Call(group, self.cpus))
        self.groups.clear()
        self.executor.send()

    def start(self, started: Started) -> None:
        """Starts a task alone. If the task waited for a copy that failed, raises the copy's error."""
        if started.copy:
            started.copy.result()
        self._call(Call([started], self.cpus))

    def _call(self, call: Call) -> None:
        """Starts a call."""
        first = call.tasks[0]
        task, trouble = first.task, first.trouble
        shared = dict(task.shared)
        if task.careful and (trouble.count or trouble.crashed):
            shared["care"] = trouble.care(self.work.note(self.kind, task.key))
        arguments, tasks = (self.work, self.flow.name, self.kind), [one.task for one in call.tasks]
        call.reference = self.executor.start(arguments, tasks, shared, call.cpus, self.memory, call.copy)
        self.under_way[call.reference] = call
        for one in call.tasks:
            one.calls.append(call)
            one.copies = one.copies + 1 if call.copy else 0
        self.slots.start(call, self.cluster.now())

    def finished(self) -> Iterator[tuple[Started, dict[str, Any]]]:
        """Waits for a call to end. Yields (a task, its record) for each task if the call succeeded. Otherwise decides which tasks
        run again."""
        self._check()
        self._look()
        self._start_copies()
        wait, unmeasured = self._start_due(), self.unmeasured and not self.full
        if not self.under_way:
            self.cluster.sleep(wait)
            return
        ended = self.executor.ended(list(self.under_way), 0.0 if unmeasured else wait)
        self.measured = self.cluster.now()  # after the look: a slow look must not be the reason for the next
        for reference in ended:
            if (call := self.under_way.pop(reference, None)) is None:
                continue  # other calls with these tasks have ended at the same time
            self.slots.end(call, self.cluster.now())
            call.leave()
            try:
                records = self.executor.records(reference)
            except Exception as e:  # noqa: BLE001 - judged
                self._fail(call, e)
                continue
            self.times.add(call, (record.get("wall", record["seconds"]) for record in records))
            for started, record in self._ended(call, records):
                self._note_end(started, record)
                yield started, record

    def _note_end(self, started: Started, record: dict[str, Any]) -> None:
        """Forgets a task's failures, and remembers one of the documents that it left out."""
        self.crashed -= len(started.trouble.crashed)
        if started.trouble.attempt:
            self.work.note(self.kind, started.task.key).delete()
        examples = record.get("examples", {})
        if crashed := examples.get(care.CRASHED) or examples.get(care.UNREAD):
            self.last = crashed[0]

    def _ended(self, call: Call, records: list[dict[str, Any]]) -> list[tuple[Started, dict[str, Any]]]:
        """Lists the tasks of a call that has ended, with their records, except those that another call ended before. Leaves calls
        that have no other tasks to the flow."""
        of_tasks = [(one, record) for one, record in zip(call.tasks, records, strict=True) if not one.ended]
        for one, _ in of_tasks:
            one.ended = True
        for other in dict.fromkeys(other for one, _ in of_tasks for other in one.calls):
            if not other.left:
                del self.under_way[other.reference]
                self.slots.end(other, self.cluster.now())
                other.leave()
                self.flow.repeated.append((self.executor, other.reference))
        return of_tasks

    def _fail(self, call: Call, error: Exception) -> None:
        """Ends a call that failed. Decides which of its tasks run again, except those that another call still runs."""
        left = call.left
        for one in left:
            if one.task.careful or not is_lost(error):
                one.copies = MOST_COPIES  # no further one, because it may fail too
        if not (alone := [one for one in left if not one.calls]):
            log.debug("%s: one of several copies of a Ray task failed (%s)", self.kind, care.last_line(error))
            return
        cause = innermost(error)
        if len(call.tasks) == 1 or self.stopped or (cause is not None and cause.exit_code == 2):
            self._judge(alone[0], error)
            return
        log.info(
            "%s: one of the %d tasks of a Ray task failed (%s). Running each task alone",
            self.kind,
            len(call.tasks),
            care.last_line(error),
        )
        self.later += alone

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
                "%d canceled Ray tasks didn't end within %.0f s, and may still run. List them with: ray list tasks", left, END_S
            )

    def _start_copies(self) -> None:
        """Starts a copy of the tasks of each late call, if all tasks have started and CPUs are idle. While a call stays late, its
        tasks get another copy at the next check, because of many copies, one is late too."""
        now = self.cluster.now()
        if not self.complete or self.size or not self.several or now - self.looked_late < LATE_LOOK_S:
            return
        self.looked_late, idle = now, self.slots.count - len(self.under_way) - len(self.later)
        if idle <= 0:
            return
        for tasks in copied(self.times.late(list(self.under_way.values()), now), idle):
            log.info("%s: a Ray task is late. Starting a copy of %d tasks on another node if possible", self.kind, len(tasks))
            self._call(Call(tasks, self.cpus, copy=True))

    def _start_due(self) -> float:
        """Starts the tasks whose pause or copy has ended. Returns the seconds until the next check of tasks and nodes."""
        if not self.executor.ready:
            return AWAY_S
        now, later, self.later = self.cluster.now(), self.later, []
        for started in later:
            if started.due > now or started.waits:
                self.later.append(started)
            else:
                self.start(started)
        look = LATE_LOOK_S if self.complete and not self.size else LOOK_S
        return max(0.0, min([look, *(AWAY_S if one.waits else one.due - now for one in self.later)]))

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
            started.offered += (cause.shipment,)
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
                for other in [*(one for call in self.under_way.values() for one in call.tasks), *self.later]:
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
        self.memory = self.flow.memory_each(max(1, min(self.cpus, max(nodes, default=0))), self.reads)
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
            self.flow.log_short_memory(self.cpus, self.reads)
        self.alone = not any(nodes)
        self.several = sum(map(bool, nodes)) > 1
        self.slots.count = self.size or max(1, self.flow.at_once(self.cpus, self.reads))
        self.room = 2 * self.size if self.size else max(2, 2 * sum(nodes) // self.cpus)

    def _request(self, cpus: int) -> None:
        """Restarts waiting calls with fewer CPUs each, because no node has the number of CPUs that these calls requested."""
        self.cpus = cpus
        withdrawn = [self.under_way.pop(reference) for reference in self.executor.withdraw(list(self.under_way))]
        for call in withdrawn:
            self.slots.end(call, self.cluster.now())
            call.leave()
        for call in withdrawn:
            if alone := [one for one in call.left if not one.calls]:  # a copy and its call are one call again
                self._call(Call(alone, cpus))
