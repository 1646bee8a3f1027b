"""Starts Ray tasks, waits for them, and cancels them. The driver does this for a small cluster, and `dispatchers` for a large
one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from heliostat.tasks.clusters import Task, TaskKind

START_S = 1.25e-3  # seconds in which the driver starts a call
ENDING_S = 2.0  # seconds for tasks to end by themselves after the run has failed
MANY, GATHER_S = 1000, 0.2  # references, and seconds: other calls are queued at the nodes, so no CPU is idle meanwhile
END_S = 60.0  # seconds for tasks to end after they are canceled


class RayTasks:
    """Runs each call as a Ray task."""

    ready, start_s = True, START_S

    def __init__(self, kind: TaskKind) -> None:
        self.kind, self.remote = kind, ray.remote(kind.execute)

    def start(self, arguments: tuple[Any, ...], tasks: list[Task], shared: Mapping[str, object], cpus: int, memory: int | None,
              backup: bool = False) -> Any:  # fmt: skip
        return self.begin(arguments, sent(tasks), shared, cpus, memory, backup)

    def begin(self, arguments: tuple[Any, ...], tasks: list[tuple[str, dict[str, Any]]], shared: Mapping[str, object], cpus: int,
              memory: int | None, backup: bool) -> Any:  # fmt: skip
        """Starts a call with what a worker needs of the tasks (`sent`)."""
        options = {"num_cpus": cpus, "memory": memory, "label_selector": dict(self.kind.labels) or None, "name": self.kind.name}
        options |= {"scheduling_strategy": "SPREAD"} if backup else {}
        return self.remote.options(max_retries=0, **options).remote(*arguments, self.kind.function, tasks, **shared)

    def send(self) -> None:
        """Does nothing: each call is sent when it starts."""

    def ended(self, references: list[Any], wait_s: float) -> list[Any]:
        return ended(references, wait_s)

    def records(self, reference: Any) -> list[dict[str, Any]]:
        return ray.get(reference)

    def withdraw(self, references: list[Any]) -> list[Any]:
        return withdrawn(references)

    def end(self, references: list[Any]) -> int:
        return end(references)


def is_lost(error: Exception) -> bool:
    """Returns whether a task failed because its process or node died, not because it raised an error."""
    return isinstance(error, RayError) and not isinstance(error, RayTaskError)


def sent(tasks: list[Task]) -> list[tuple[str, dict[str, Any]]]:
    """Returns what a worker needs of the tasks: their keys and arguments."""
    return [(task.key, task.arguments) for task in tasks]


def ended(references: list[Any], wait_s: float) -> list[Any]:
    """Waits for one call, then returns every call that has ended. A wait looks at all references, so one wait per call would cost
    the square of the number of CPUs. With more than MANY references, lets calls end for GATHER_S seconds between two waits."""
    ready, _ = ray.wait(references, num_returns=1, timeout=wait_s)
    if not ready or len(references) == 1:
        return ready
    if len(references) > MANY:
        time.sleep(GATHER_S)
    return ray.wait(references, num_returns=len(references), timeout=0)[0]


def withdrawn(references: list[Any]) -> list[Any]:
    """Cancels the tasks that haven't ended, and returns their references."""
    _, waiting = ray.wait(references, num_returns=len(references), timeout=0) if references else ([], [])
    for reference in waiting:
        ray.cancel(reference)
    return waiting


def end(references: list[Any]) -> int:
    """Cancels running tasks, so that these tasks write nothing after an error was reported. Returns the number of tasks that
    still run after END_S seconds.

    First waits ENDING_S seconds for tasks to end, because Ray aborts this process if a task is canceled while it completes.
    """
    _, working = ray.wait(references, num_returns=len(references), timeout=ENDING_S) if references else ([], [])
    for reference in working:
        ray.cancel(reference)
    if not working:
        return 0
    _, left = ray.wait(working, num_returns=len(working), timeout=END_S)
    return len(left)
