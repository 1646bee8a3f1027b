"""Runs tasks on Ray: as Ray tasks, or in actors that keep their loaded models."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray

from heliostat.cluster.capacity import selects
from heliostat.tasks import dispatchers, ray_tasks
from heliostat.tasks.clusters import Executor, Task, TaskKind
from heliostat.tasks.dispatchers import DispatchedTasks, Dispatchers
from heliostat.tasks.pool import ActorPool
from heliostat.tasks.ray_tasks import RayTasks, end, ended, is_lost, sent


class RayCluster:
    """Runs tasks on the Ray cluster to which this process is connected. On a large cluster, dispatchers start the tasks."""

    def __init__(self) -> None:
        self.dispatchers: Dispatchers | None = None

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
        if kind.actors:
            return RayActors(kind)
        if self.dispatchers is None and (count := dispatchers.needed(sum(self.nodes(kind.labels, "CPU")))):
            self.dispatchers = Dispatchers(count, kind.labels)
        return DispatchedTasks(kind, self.dispatchers) if self.dispatchers else RayTasks(kind)

    def close(self) -> None:
        if self.dispatchers:
            self.dispatchers.close()
        self.dispatchers = None


class RayActors:
    """Runs the tasks in actors, which keep their loaded models."""

    start_s = ray_tasks.START_S

    def __init__(self, kind: TaskKind) -> None:
        labels = dict(kind.labels) or None
        self.kind = kind
        self.pool = ActorPool(kind.execute, kind.actors, num_cpus=kind.cpus, num_gpus=kind.gpus, label_selector=labels)

    @property
    def ready(self) -> bool:
        return self.pool.ready

    def start(self, arguments: tuple[Any, ...], tasks: list[Task], shared: Mapping[str, object], cpus: int, memory: int | None,
              backup: bool = False) -> Any:  # fmt: skip
        return self.pool.remote(*arguments, self.kind.function, sent(tasks), **shared)

    def send(self) -> None:
        """Does nothing: each call is sent when it starts."""

    def ended(self, references: list[Any], wait_s: float) -> list[Any]:
        return ended(references, wait_s)

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
        return end(references)
