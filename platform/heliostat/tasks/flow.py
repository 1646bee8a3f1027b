"""Runs tasks on Ray, as many at once as the cluster has room for, and skips tasks that an earlier run has finished.

The driver holds one record per task, but no ids or texts of documents. A task that starts again, in this run or another, writes
the same files. A task's worker or node may die after the task has recorded its result, but before the driver receives the result.
The next start of the task then returns the record. A failed task runs again while the others continue (`crew`).
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, TypeVar

import pyarrow as pa

from heliostat.errors import DataError
from heliostat.tasks import cpu_time, spill
from heliostat.tasks.calls import LATE_S, Started
from heliostat.tasks.care import CRASHED, UNREAD
from heliostat.tasks.clusters import Cluster, CountedTasks, Executor, Task, TaskKind
from heliostat.tasks.crew import Crew
from heliostat.tasks.pool import TaskFunction
from heliostat.tasks.progress import Progress, documents
from heliostat.tasks.ray_cluster import RayCluster
from heliostat.tasks.work import Work

BATCH = 4096  # keys that are looked up at once
UNKNOWN = 1 << 40  # tasks that follow, if there may be any number
MIB = 1 << 20
LEAST_MEMORY = 64 * MIB  # minimum of `memory_limit`
log = logging.getLogger(__name__)
Taken = TypeVar("Taken")


@dataclass
class Flow:
    """Runs a pipeline's tasks on the nodes that have the pipeline's labels.

    Counts the tasks of each kind: those that this run has `done`, and those `kept` from an earlier run.
    """

    work: Work
    labels: dict[str, str] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """CPU seconds of the tasks of each kind, including those that an earlier run has finished."""
    walls: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds of the same tasks, including waits for storage, GPUs, or a busy machine."""
    opening: dict[str, float] = field(default_factory=dict)
    """The part of `seconds` in which processes open stages. Each process opens a stage once, for any amount of data."""

    crashed: int = 0
    """Number of documents that tasks left out, because these documents crashed the task (`care`)."""
    passed: int = 0
    """Number of documents that tasks kept, and passed on to later tasks."""
    memory: int = 0
    """Bytes of memory that each task requests from Ray, so that only as many tasks run on a node as fit. 0: no request."""
    input_memory: int = 0
    """Bytes of memory in which a task that `reads` the pipeline's input reads it in advance."""
    short: bool = False
    """Whether this run has already logged that a lack of memory leaves CPUs idle."""
    progress: Progress = field(default_factory=Progress)
    cluster: Cluster = field(default_factory=RayCluster)
    repeated: list[tuple[Executor, Any]] = field(default_factory=list)
    """Calls that still run although another call has finished their tasks: (executor, reference)."""
    early: list[Generator[tuple[int, dict[str, Any]] | None, None, None]] = field(default_factory=list)
    """Tasks that have started with `ahead`."""
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Name of this run. Tasks compare this name with the name in a record, to find out whether this run wrote the record."""

    def share(self, value: object) -> object:
        """Stores a value in Ray's object store; returns the reference for `Task.shared`."""
        return self.cluster.share(value)

    def cpus(self) -> int:
        """Returns the number of CPUs of all live nodes with the pipeline's labels; at least 1."""
        return max(1, sum(self.nodes()))

    def nodes(self, resource: str = "CPU") -> list[int]:
        """Lists the number of CPUs of each live node with the pipeline's labels. With another `resource`, lists GPUs or bytes of
        memory."""
        return self.cluster.nodes(self.labels, resource)

    def cpus_each(self, tasks: int) -> int:
        """Computes the maximum CPUs that each of `tasks` tasks can request so that all tasks run at once; at least 1."""
        return most_each(self.nodes(), tasks)

    def devices(self, each: float = 1.0) -> int:
        """Returns the number of GPUs that the live nodes with the pipeline's labels have for actors with `each` GPUs: the GPUs of
        all nodes, or those of the largest node if an actor needs several."""
        nodes = self.nodes("GPU")
        return sum(nodes) if each <= 1 else max(nodes, default=0)

    def memory_each(self, cpus: int = 1, reads: bool = False) -> int | None:
        """Computes the bytes of memory that a task with `cpus` CPUs requests, with the memory for reads in advance (`_advance`);
        None for no request. `reads`: whether the task reads the pipeline's input.

        The result is at most the memory of the largest node with `cpus` CPUs. A task that requests more memory would wait
        forever.
        """
        nodes = zip(self.nodes(), self.nodes("memory"), strict=True)
        most = max((memory for have, memory in nodes if have >= cpus), default=0)
        return min(self.memory + self._advance(reads), most) or None if self.memory else None

    def _advance(self, reads: bool) -> int:
        """Returns the bytes of memory in which a task reads temporary files or the input in advance, in addition to `memory`. No
        task reads both."""
        return max(spill.MEMORY if self.work.location.is_s3 else 0, self.input_memory if reads else 0)

    def at_once(self, cpus: int, reads: bool = False) -> int:
        """Computes how many tasks with `cpus` CPUs each have room at the same time, by the nodes' CPUs and memory."""
        return _at_once(self._rooms(cpus), self.memory_each(cpus, reads))

    def log_short_memory(self, cpus: int, reads: bool = False) -> None:
        """Logs once if tasks with `cpus` CPUs each leave CPUs idle, because the nodes have too little memory for more tasks."""
        rooms, advance = self._rooms(cpus), self._advance(reads)
        need, room = self.memory_each(cpus, reads), _at_once(rooms, None)
        if self.short or not need or (many := _at_once(rooms, need)) >= room:
            return
        fits = min(memory // tasks for tasks, memory in rooms) - advance
        self.short, better = True, max(LEAST_MEMORY, fits // MIB * MIB)
        fix = (
            f"Set memory_limit: {better // MIB}MiB to run {_at_once(rooms, better + advance)} at once, or"
            if better + advance < need
            else "To run more,"
        )
        log.warning(
            ("memory_limit: %.0f MiB per task leaves room for %d tasks at once, but the CPUs could run %d. %s "
                "give the nodes more memory"), (self.memory + advance) / MIB, many, room, fix,
        )  # fmt: skip

    def _rooms(self, cpus: int) -> list[tuple[int, int]]:
        """Lists, for each node, how many tasks with `cpus` CPUs its CPUs can run, and its bytes of memory."""
        nodes = zip(self.nodes(), self.nodes("memory"), strict=True)
        return [(have // cpus, memory) for have, memory in nodes if have >= cpus]

    def run(self, kind: str, function: TaskFunction, tasks: Iterator[Task], **more: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (the task's number, its record) as tasks finish. `more`: see `_running`."""
        return filter(None, self._running(kind, function, tasks, **more))

    def ahead(self, kind: str, function: TaskFunction, tasks: Iterator[Task], **more: Any) -> Callable[[], list[dict[str, Any]]]:
        """Starts the tasks at once, and returns a function that waits for them, and returns their records in the tasks' order.

        Other tasks can run meanwhile. A task that fails runs again when the function is called, so this is for tasks that take
        little of the cluster. If an error prevents the call, `close` ends the tasks.
        """
        running = self._running(kind, function, tasks, **more)
        self.early.append(running)
        values = dict(iter(running.__next__, None))

        def records() -> list[dict[str, Any]]:
            values.update(filter(None, running))
            return [values[number] for number in range(len(values))]

        return records

    def _running(self, kind: str, function: TaskFunction, tasks: Iterator[Task], cpus: int = 1,
                 valid: Callable[[dict[str, Any]], bool] = lambda record: True,
                 pooled: bool = False, actors: int = 0, gpus: float = 1.0,
                 reads: bool = False) -> Generator[tuple[int, dict[str, Any]] | None, None, None]:  # fmt: skip
        """Yields (the task's number, its record) as tasks finish, and None when all tasks have started. A task with a record that
        isn't `valid` runs again.

        The function gets the folder for temporary files and the task's arguments. In its record, `files` lists the temporary
        files. If `actors` isn't 0, tasks run in `actors` actors. If `actors` is 0 and `pooled` is true, tasks run in one actor
        per GPU of the cluster. Each actor has `gpus` GPUs. Without actors, tasks run as Ray tasks. `reads`: whether the tasks
        read the pipeline's input.
        """
        size = actors or (self.devices() if pooled else 0)
        crew = Crew(self, TaskKind(kind, execute_all, function, cpus, size, gpus, self.labels, reads))
        try:
            for number, task, record, left in self._looked_up(kind, tasks, valid):
                if record is not None:
                    self._count(self.kept, kind, record)
                    yield number, record
                    continue
                while (crew.full or crew.unmeasured) and not crew.stopped:
                    yield from self._next(kind, crew)
                if crew.stopped:
                    break
                crew.add(Started(number, task), left)
            crew.completed()
            yield None
            while crew.busy:
                yield from self._next(kind, crew)
        except BaseException:
            crew.end()
            raise
        crew.end()
        crew.conclude()

    def all(self, kind: str, function: TaskFunction, tasks: Iterator[Task], **more: Any) -> list[dict[str, Any]]:
        """Runs the tasks and returns their records in the tasks' order."""
        return self.taken(kind, function, tasks, lambda record: record, **more)

    def taken(self, kind: str, function: TaskFunction, tasks: Iterator[Task], take: Callable[[dict[str, Any]], Taken],
              **more: Any) -> list[Taken]:  # fmt: skip
        """Runs the tasks and returns what `take` returns for each record, in the tasks' order. For kinds with one task per piece
        of the input: complete records of millions of tasks don't fit into the driver's memory."""
        values = {number: take(record) for number, record in self.run(kind, function, tasks, **more)}
        return [values.pop(number) for number in range(len(values))]

    def close(self) -> None:
        """Ends the tasks that have started ahead, and whose records nothing waits for. Waits for the calls that still run
        although their tasks are finished, and cancels them after some seconds. A call that continues writes no record after the
        work folder is removed (`execute`)."""
        repeated = dict[type, tuple[Executor, list[Any]]]()
        for executor, reference in self.repeated:  # while a cluster grows, it gets dispatchers, whose references are numbers
            repeated.setdefault(type(reference), (executor, []))[1].append(reference)
        try:
            for running in self.early:
                running.close()
            left = sum(executor.end(references) for executor, references in repeated.values())
        finally:
            self.early.clear()
            self.repeated.clear()
            self.cluster.close()
        if left:
            log.warning("%d canceled Ray tasks still run. List them with: ray list tasks", left)

    def __enter__(self) -> Flow:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def forget(self, kind: str) -> None:
        """Removes the seconds of a kind of tasks from the totals, for example if only a prediction needs this kind."""
        for counts in (self.seconds, self.walls, self.opening):
            counts.pop(kind, None)

    def _looked_up(
        self, kind: str, tasks: Iterator[Task], valid: Callable[[dict[str, Any]], bool]
    ) -> Iterator[tuple[int, Task, dict[str, Any] | None, int]]:
        """Yields (number of the task, task, its record if it is finished, number of tasks to run after this one). The last number
        is at least UNKNOWN until heliostat has looked up all tasks, except for `CountedTasks`. Of the tasks that are looked up at
        once, yields the largest first, so that no long task starts last."""
        number, whole, count = 0, False, tasks.count if isinstance(tasks, CountedTasks) else 2 * UNKNOWN
        while not whole:
            batch = list(islice(tasks, BATCH))
            whole = len(batch) < BATCH
            known = {k: r for k, r in self.work.found(kind, (task.key for task in batch)).items() if valid(r)}
            older = {task.before: task.key for task in batch if task.before not in ("", task.key) and task.key not in known}
            known |= {older[k]: r for k, r in self.work.found(kind, older).items() if valid(r)}
            todo = [task.bytes for task in batch if task.key not in known]
            self.progress.found(kind, list(known.values()), todo, whole)
            left = len(todo) + (0 if whole else max(0, count - number - len(batch)))
            for place in sorted(range(len(batch)), key=lambda place: -batch[place].bytes):
                task = batch[place]
                left -= task.key not in known
                yield number + place, task, known.get(task.key), left
            number += len(batch)

    def _next(self, kind: str, crew: Crew) -> Iterator[tuple[int, dict[str, Any]]]:
        for started, record in crew.finished():
            self._count(self.done, kind, record)
            self.progress.done(kind, record, started.task.bytes)
            yield started.number, record

    def _count(self, counts: dict[str, int], kind: str, record: dict[str, Any]) -> None:
        counts[kind] = counts.get(kind, 0) + 1
        self.seconds[kind] = self.seconds.get(kind, 0.0) + record["seconds"]
        self.walls[kind] = self.walls.get(kind, 0.0) + record.get("wall", record["seconds"])
        self.opening[kind] = self.opening.get(kind, 0.0) + record.get("opening", 0.0)
        self.passed += documents(record)
        self.crashed += sum(record.get("reasons", {}).get(reason, 0) for reason in (CRASHED, UNREAD))
        for message in record.get("unread", []):
            log.warning(
                "%s: %s. The rest of this file or range is missing from the dataset. To add the rest, repair the file",
                kind,
                message.rstrip("."),
            )


def most_each(nodes: list[int], tasks: int) -> int:
    """Computes the maximum number of CPUs per task with which `tasks` tasks can run at the same time; at least 1.

    `nodes`: CPUs of each node; a task runs on one node.
    """
    return next((each for each in range(max(nodes, default=1), 1, -1) if sum(n // each for n in nodes) >= tasks), 1)


def _at_once(rooms: list[tuple[int, int]], memory: int | None) -> int:
    return sum(min(tasks, have // memory) if memory else tasks for tasks, have in rooms)


def execute_all(work: Work, run: str, kind: str, function: TaskFunction, tasks: list[tuple[str, dict[str, Any]]],
                **shared: object) -> list[dict[str, Any]]:  # fmt: skip
    """Runs the tasks of a call one after another in this process, and returns their records. `tasks`: (key, arguments)."""
    begun = time.monotonic()
    with spill.footers_kept() if len(tasks) > 1 else nullcontext():
        return [execute(work, run, kind, key, function, arguments, begun, **shared) for key, arguments in tasks]


def execute(work: Work, run: str, kind: str, key: str, function: TaskFunction, arguments: dict[str, Any],
            begun: float | None = None, **shared: object) -> dict[str, Any]:  # fmt: skip
    """Runs a task in this process, and writes and returns its record. `begun`: when the call of the task began; None for now.

    If this run has already recorded the task, only returns the task's record. If the run has ended and removed the work folder
    meanwhile, because another call finished the task earlier, deletes the task's files, and raises DataError.
    """
    known = work.read(kind, key)
    if known is not None and known.get("run") == run:
        return known
    start, cpu, loaded = time.monotonic(), cpu_time.now(), cpu_time.loaded()
    pa.set_memory_pool(pa.system_memory_pool())  # other pools keep freed memory, several times as much as a task needs
    result = function(work.spill, **arguments, **shared)
    spent, loading = cpu_time.now() - cpu, cpu_time.loaded() - loaded
    record: dict[str, Any] = {**result, "seconds": round(spent + loading, 3), "wall": round(time.monotonic() - start, 3)}
    if loading:
        record["opening"] = record.get("opening", 0.0) + loading
    record["run"] = run
    pa.default_memory_pool().release_unused()
    if time.monotonic() - (start if begun is None else begun) > LATE_S and work.is_removed:  # a shorter call has no copy
        work.remove(record.get("files", []))
        raise DataError(f"work: {work.location}: the run has ended and removed this folder, so the task's files were removed too")
    work.finish(kind, key, record)
    return record
