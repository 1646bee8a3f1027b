"""Runs tasks on Ray: as Ray tasks, or in actors that keep their loaded models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from heliostat.cluster.capacity import selects
from heliostat.tasks.clusters import Executor, Task, TaskKind
from heliostat.tasks.pool import ActorPool

ENDING_S = 2.0  # seconds for tasks to end by themselves after the run has failed
MANY, GATHER_S = 1000, 0.2  # references, and seconds: other calls are queued at the nodes, so no CPU is idle meanwhile
END_S = 60.0  # seconds for tasks to end after they are canceled


class RayCluster:
    """Runs tasks on the Ray cluster to which this process is connected."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def nodes(self, labels: Mapping[str, str], resource: str) -> list[int]:
        mine = [n for n in ray.nodes() if n["Alive"] and selects(labels, n.get("Labels") or {})]
        return [int(n["Resources"].get(resource, 0)) for n in mine]

    def share(self, value: object) -> object:
        return ray.put(value)

    def executor(self, kind: TaskKind) -> Executor:
        return RayActors(kind) if kind.actors else RayTasks(kind)


class RayTasks:
    """Runs each call as a Ray task."""

    ready = True

    def __init__(self, kind: TaskKind) -> None:
        self.kind, self.remote = kind, ray.remote(kind.execute)

    def start(self, arguments: tuple[Any, ...], tasks: list[Task], shared: Mapping[str, object], cpus: int, memory: int | None,
              backup: bool = False) -> Any:  # fmt: skip
        options = {"num_cpus": cpus, "memory": memory, "label_selector": dict(self.kind.labels) or None, "name": self.kind.name}
        options |= {"scheduling_strategy": "SPREAD"} if backup else {}
        return self.remote.options(max_retries=0, **options).remote(*arguments, self.kind.function, _sent(tasks), **shared)

    def ended(self, references: list[Any], wait_s: float) -> list[Any]:
        return _ended(references, wait_s)

    def records(self, reference: Any) -> list[dict[str, Any]]:
        return ray.get(reference)

    def withdraw(self, references: list[Any]) -> list[Any]:
        _, waiting = ray.wait(references, num_returns=len(references), timeout=0) if references else ([], [])
        for reference in waiting:
            ray.cancel(reference)
        return waiting

    def end(self, references: list[Any]) -> int:
        return _end(references)


class RayActors:
    """Runs the tasks in actors, which keep their loaded models."""

    def __init__(self, kind: TaskKind) -> None:
        labels = dict(kind.labels) or None
        self.kind = kind
        self.pool = ActorPool(kind.execute, kind.actors, num_cpus=kind.cpus, num_gpus=kind.gpus, label_selector=labels)

    @property
    def ready(self) -> bool:
        return self.pool.ready

    def start(self, arguments: tuple[Any, ...], tasks: list[Task], shared: Mapping[str, object], cpus: int, memory: int | None,
              backup: bool = False) -> Any:  # fmt: skip
        return self.pool.remote(*arguments, self.kind.function, _sent(tasks), **shared)

    def ended(self, references: list[Any], wait_s: float) -> list[Any]:
        return _ended(references, wait_s)

    def records(self, reference: Any) -> list[dict[str, Any]]:
        try:
            records = ray.get(reference)
        except Exception as e:
            (self.pool.lost if is_lost(e) else self.pool.ended)(reference)
            raise
        self.pool.ended(reference)
        return records

    def withdraw(self, references: list[Any]) -> list[Any]:
        return []

    def end(self, references: list[Any]) -> int:
        self.pool.end()
        return _end(references)


def is_lost(error: Exception) -> bool:
    """Returns whether a task failed because its process or node died, not because it raised an error."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def _sent(tasks: list[Task]) -> list[tuple[str, dict[str, Any]]]:
    """Returns what a worker needs of the tasks: their keys and arguments."""
    return [(task.key, task.arguments) for task in tasks]


def _ended(references: list[Any], wait_s: float) -> list[Any]:
    """Waits for one call, then returns every call that has ended. A wait looks at all references, so one wait per call would cost
    the square of the number of CPUs. With more than MANY references, lets calls end for GATHER_S seconds between two waits."""
    ready, _ = ray.wait(references, num_returns=1, timeout=wait_s)
    if not ready or len(references) == 1:
        return ready
    if len(references) > MANY:
        time.sleep(GATHER_S)
    return ray.wait(references, num_returns=len(references), timeout=0)[0]


def _end(references: list[Any]) -> int:
    """Cancels running tasks, so that these tasks write nothing after an error was reported.

    First waits ENDING_S seconds for tasks to end, because Ray aborts this process if a task is canceled while it completes.
    """
    _, working = ray.wait(references, num_returns=len(references), timeout=ENDING_S) if references else ([], [])
    for reference in working:
        ray.cancel(reference)
    if not working:
        return 0
    _, left = ray.wait(working, num_returns=len(working), timeout=END_S)
    return len(left)
