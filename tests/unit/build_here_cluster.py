"""Builds a cluster that runs each task at once, in the process of the test."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from heliostat.tasks.clusters import Executor, Task, TaskKind


class HereCluster:
    """Has one node with four CPUs."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def nodes(self, labels: Mapping[str, str], resource: str) -> list[int]:
        return [{"CPU": 4, "memory": 1 << 40}.get(resource, 0)]

    def share(self, value: object) -> object:
        return value

    def executor(self, kind: TaskKind) -> Executor:
        return HereExecutor(kind)


class HereExecutor:
    ready = True

    def __init__(self, kind: TaskKind) -> None:
        self.kind, self.records = kind, dict[int, Any]()

    def start(self, arguments: tuple[Any, ...], task: Task, shared: Mapping[str, object], cpus: int, memory: int | None) -> Any:
        record = self.kind.execute(*arguments, task.key, self.kind.function, task.arguments, **shared)
        self.records[number := len(self.records)] = record
        return number

    def ended(self, references: list[Any], wait_s: float) -> list[Any]:
        return references

    def record(self, reference: Any) -> dict[str, Any]:
        return self.records[reference]

    def withdraw(self, references: list[Any]) -> list[Any]:
        return []

    def end(self, references: list[Any]) -> int:
        return 0
