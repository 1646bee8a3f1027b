"""Measures the tasks of a real run for a simulation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from heliostat.curation.simulation.profile import Profile, Sizes, rows_in
from heliostat.errors import ConfigError
from heliostat.tasks.clusters import Cluster, Executor, Task, TaskKind


class MeasuringCluster:
    """Runs tasks on another cluster, and measures them for a profile."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.profile, self.sizes = cluster, Profile(), Sizes()

    def now(self) -> float:
        return self.cluster.now()

    def sleep(self, seconds: float) -> None:
        self.cluster.sleep(seconds)

    def nodes(self, labels: Mapping[str, str], resource: str) -> list[int]:
        return self.cluster.nodes(labels, resource)

    def share(self, value: object) -> object:
        return self.sizes.share(self.cluster.share(value), value)

    def executor(self, kind: TaskKind) -> Executor:
        if kind.actors:
            raise ConfigError(f"--simulate: {kind.name}: models in actors aren't supported. Remove --simulate, or these models")
        return _Measuring(self.cluster.executor(kind), kind, self.profile, self.sizes)

    def close(self) -> None:
        self.cluster.close()


class _Measuring:
    def __init__(self, executor: Executor, kind: TaskKind, profile: Profile, sizes: Sizes) -> None:
        self.executor, self.kind, self.profile, self.sizes, self.start_s = executor, kind, profile, sizes, executor.start_s
        self.call, self.tasks = profile.begin(kind.name), dict[Any, list[Task]]()

    @property
    def ready(self) -> bool:
        return self.executor.ready

    def start(self, arguments: tuple[Any, ...], tasks: list[Task], shared: Mapping[str, object], cpus: int, memory: int | None,
              backup: bool = False) -> Any:  # fmt: skip
        reference = self.executor.start(arguments, tasks, shared, cpus, memory, backup)
        self.tasks[reference] = tasks
        return reference

    def send(self) -> None:
        self.executor.send()

    def ended(self, references: list[Any], wait_s: float) -> list[Any]:
        return self.executor.ended(references, wait_s)

    def records(self, reference: Any) -> list[dict[str, Any]]:
        records = self.executor.records(reference)
        for task, record in zip(self.tasks.pop(reference), records, strict=True):
            rows = rows_in(task.arguments.get("runs", []))
            self.profile.add(self.kind.name, self.call, self.sizes.read(task), record | ({"of_rows": rows} if rows else {}))
        return records

    def withdraw(self, references: list[Any]) -> list[Any]:
        return self.executor.withdraw(references)

    def end(self, references: list[Any]) -> int:
        return self.executor.end(references)
