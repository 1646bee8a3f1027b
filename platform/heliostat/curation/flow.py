"""Runs tasks on Ray, as many at a time as the cluster has room for, and skips those that an earlier run has finished.

The driver holds a record for each task, and neither ids nor texts. Tasks that are started again, by Ray or by a later run, write
the same files; one that this run has recorded, and whose answer was lost with its worker or node, is not done again. What a task
raises ends the run, after those that are at work have ended, and what of it is meant for the person is raised as it was.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import ray

from heliostat.curation import cpu_time
from heliostat.curation.pool import Pool
from heliostat.curation.progress import Progress
from heliostat.curation.work import Work
from heliostat.errors import unwrapped

log = logging.getLogger(__name__)

RETRIES = 5  # of a task whose worker or node died
LOOK_S = 10.0  # between looks at how many CPUs the cluster has
ENDING_S = 2.0  # for tasks to end by themselves after another has failed
END_S = 60.0  # and when they are cancelled
BATCH = 4096  # keys that are looked up together


@dataclass(frozen=True)
class Task:
    """Describes a task: the key that its result follows from, and what its function is called with."""

    key: str
    arguments: dict[str, Any]
    shared: dict[str, Any] = field(default_factory=dict)
    """Further arguments, each from `Flow.share`: what is large and the same for many tasks travels to a node once."""
    bytes: int = 0
    """That it reads, about: for the progress."""


@dataclass
class Flow:
    """Runs a pipeline's tasks, on nodes that carry the labels; counts what was done and what had been done before."""

    work: Work
    labels: dict[str, str] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    """Of processor time that the tasks of each kind took, also those that an earlier run has finished."""
    walls: dict[str, float] = field(default_factory=dict)
    """The same on the clock, with what they waited for: storage, GPUs, or a busy machine."""
    opening: dict[str, float] = field(default_factory=dict)
    """Those of them in which stages were opened: once in each process, however much it does."""

    memory: int = 0
    """Bytes that a task may take, which Ray is asked for: so many tasks run on a node as have room there. 0: not asked."""
    progress: Progress = field(default_factory=Progress)
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Of this run, by which its tasks know what it has recorded."""

    def share(self, value: Any) -> Any:
        """Returns what stands for the value in `Task.shared`."""
        return ray.put(value)

    def cpus(self) -> int:
        """Returns how many CPUs the cluster has."""
        return max(1, int(ray.cluster_resources().get("CPU", 1.0)))

    def devices(self) -> int:
        """Returns how many GPUs the cluster has."""
        return int(ray.cluster_resources().get("GPU", 0.0))

    def room(self) -> float | None:
        """Computes the bytes of memory that a task requests: no more than the largest node has, where it would wait forever."""
        most = max((node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
        return min(self.memory, most) or None

    def run(self, kind: str, function: Callable[..., dict[str, Any]], tasks: Iterator[Task], cpus: int = 1,
            valid: Callable[[dict[str, Any]], bool] = lambda record: True,
            pooled: bool = False, actors: int = 0, gpus: float = 1.0) -> Iterator[tuple[int, dict[str, Any]]]:  # fmt: skip
        """Yields (the task's number, its record) as tasks finish; a record that is not `valid` is made again.

        The function is called with the work folder and the task's arguments; in its record, `files` names the spill files. Where
        they are `pooled`, tasks run in actors, one for each GPU of the cluster, if it has any; else in so many `actors`, if any,
        with so many `gpus` each.
        """
        waiting: dict[Any, tuple[int, int]] = {}
        work = Work(self.work.location)  # without what was looked up
        size = actors or (self.devices() if pooled else 0)
        pool = Pool(execute, size, RETRIES, num_cpus=cpus, num_gpus=gpus, label_selector=self.labels or None) if size else None
        remote = pool or _execute.options(
            num_cpus=cpus, memory=self.room(), max_retries=RETRIES, label_selector=self.labels or None, name=kind
        )
        room: Callable[[], int] = (lambda: 2 * size) if pool else Room(cpus)
        try:
            for number, task, record in self._looked_up(kind, tasks, valid):
                if record is not None:
                    self._count(self.kept, kind, record)
                    yield number, record
                    continue
                while len(waiting) >= room():
                    yield from self._next(kind, waiting, pool)
                started = remote.remote(work, self.name, kind, task.key, function, task.arguments, **task.shared)
                waiting[started] = (number, task.bytes)
            while waiting:
                yield from self._next(kind, waiting, pool)
        except BaseException:
            if pool:
                pool.end()
            _end(list(waiting))
            raise
        if pool:
            pool.end()

    def all(self, kind: str, function: Callable[..., dict[str, Any]], tasks: Iterator[Task], **more: Any) -> list[dict[str, Any]]:
        """Runs the tasks and returns their records in the tasks' order."""
        found = dict(self.run(kind, function, tasks, **more))
        return [found[number] for number in range(len(found))]

    def forget(self, kind: str) -> None:
        """Forgets the seconds of a kind of tasks, such as one that only a prediction needs."""
        for counts in (self.seconds, self.walls, self.opening):
            counts.pop(kind, None)

    def _looked_up(self, kind: str, tasks: Iterator[Task], valid: Callable[[dict[str, Any]], bool]) -> Iterator[Any]:
        number = 0
        whole = False
        while not whole:
            batch = list(islice(tasks, BATCH))
            whole = len(batch) < BATCH
            known = {k: r for k, r in self.work.found(kind, (task.key for task in batch)).items() if valid(r)}
            todo = [task.bytes for task in batch if task.key not in known]
            self.progress.found(kind, list(known.values()), todo, whole)
            for task in batch:
                yield number, task, known.get(task.key)
                number += 1

    def _next(self, kind: str, waiting: dict[Any, tuple[int, int]], pool: Pool | None) -> Iterator[tuple[int, dict[str, Any]]]:
        ready, _ = ray.wait(list(waiting), num_returns=1)
        for reference in ready:
            number, bytes = waiting.pop(reference)
            with unwrapped():
                record = ray.get(reference)
            self._count(self.done, kind, record)
            if pool:
                pool.ended(reference)
            self.progress.done(kind, record, bytes)
            yield number, record

    def _count(self, counts: dict[str, int], kind: str, record: dict[str, Any]) -> None:
        counts[kind] = counts.get(kind, 0) + 1
        self.seconds[kind] = self.seconds.get(kind, 0.0) + record["seconds"]
        self.walls[kind] = self.walls.get(kind, 0.0) + record.get("wall", record["seconds"])
        self.opening[kind] = self.opening.get(kind, 0.0) + record.get("opening", 0.0)


class Room:
    """Tells how many tasks may be under way: twice as many as there are CPUs, looked up again as nodes come and go."""

    def __init__(self, cpus: int) -> None:
        self.cpus, self.looked, self.count = cpus, -LOOK_S, 0

    def __call__(self) -> int:
        if time.monotonic() - self.looked >= LOOK_S:
            self.count = max(2, 2 * int(ray.cluster_resources().get("CPU", 1.0)) // self.cpus)
            self.looked = time.monotonic()
        return self.count


def execute(work: Work, run: str, kind: str, key: str, function: Callable[..., dict[str, Any]], arguments: dict[str, Any],
            **shared: Any) -> dict[str, Any]:  # fmt: skip
    """Runs a task where it is called, and records it; returns the record that this run has of it already, if it has one."""
    known = work.read(kind, key)
    if known is not None and known.get("run") == run:
        return known
    start, cpu = time.monotonic(), cpu_time.now()
    pa.set_memory_pool(pa.system_memory_pool())  # others keep what is freed, several times what a task holds
    record = function(work.spill, **arguments, **shared)
    record |= {"seconds": round(cpu_time.now() - cpu, 3), "wall": round(time.monotonic() - start, 3), "run": run}
    pa.default_memory_pool().release_unused()
    work.finish(kind, key, record)
    return record


_execute = ray.remote(execute)


def _end(references: list[Any]) -> None:
    """Ends tasks that are at work, so that nothing is written after an error was told.

    What is about to end is let end: Ray aborts this process if a task that it is just completing is cancelled.
    """
    _, working = ray.wait(references, num_returns=len(references), timeout=ENDING_S) if references else ([], [])
    for reference in working:
        ray.cancel(reference)
    if working:
        _, left = ray.wait(working, num_returns=len(working), timeout=END_S)
        if left:
            log.warning("%d tasks did not end within %.0f s", len(left), END_S)
