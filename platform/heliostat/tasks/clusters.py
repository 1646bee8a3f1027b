"""Defines a task, and everything that a crew needs from a cluster: nodes, a clock, and executors of tasks.

`ray_cluster` implements this with Ray, and `curation.simulation` with a virtual clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from heliostat.tasks.pool import TaskFunction


@dataclass(frozen=True, slots=True)
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
    can_repeat: bool = True
    """Whether a second copy may run at the same time. A task that fetches URLs would send twice as many requests to a host."""
    before: str = ""
    """Key of the same task in earlier versions of heliostat. If a record has this key, the task is finished."""


@dataclass(frozen=True)
class CountedTasks(Iterator[Task]):
    """Yields tasks whose number is known before they exist. So calls become shorter in time before the last task."""

    tasks: Iterator[Task]
    count: int

    def __next__(self) -> Task:
        return next(self.tasks)


@dataclass(frozen=True)
class TaskKind:
    """Describes the tasks of one kind: how a call runs, the CPUs of a task, and the number of actors (0: Ray tasks) with their
    GPUs. `reads`: whether the tasks read the pipeline's input."""

    name: str
    execute: Callable[..., list[dict[str, Any]]]
    function: TaskFunction
    cpus: int = 1
    actors: int = 0
    gpus: float = 1.0
    labels: Mapping[str, str] = field(default_factory=dict)
    reads: bool = False


class Executor(Protocol):
    """Runs the tasks of one kind. A reference stands for a call that was started."""

    @property
    def start_s(self) -> float:
        """Returns the seconds in which the driver starts a call."""

    @property
    def ready(self) -> bool:
        """Returns whether new tasks can start now."""

    def start(self, arguments: tuple[Any, ...], tasks: list[Task], shared: Mapping[str, object], cpus: int, memory: int | None,
              backup: bool = False) -> Any:  # fmt: skip
        """Starts a call that runs tasks one after another, and returns its reference. `arguments`: the arguments of `execute`
        before the tasks; `backup`: whether the call repeats a call that still runs, and so needs another node."""

    def send(self) -> None:
        """Sends the calls that wait until several calls can be sent at once."""

    def ended(self, references: list[Any], wait_s: float) -> list[Any]:
        """Waits up to `wait_s` seconds for a call to end; returns the references of all calls that have ended."""

    def records(self, reference: Any) -> list[dict[str, Any]]:
        """Returns the records of a call's tasks; raises the error of the task that failed."""

    def withdraw(self, references: list[Any]) -> list[Any]:
        """Cancels the calls that haven't ended; returns their references."""

    def end(self, references: list[Any]) -> int:
        """Ends the executor and these calls. Returns the number of calls that didn't end in time."""


class Cluster(Protocol):
    """Has nodes, starts executors, and keeps the time."""

    def now(self) -> float:
        """Returns the seconds of a clock that never goes back."""

    def sleep(self, seconds: float) -> None:
        """Waits."""

    def nodes(self, labels: Mapping[str, str], resource: str) -> list[int]:
        """Lists the amount of a resource on each live node with the labels."""

    def share(self, value: object) -> object:
        """Stores a value once for many tasks; returns its reference."""

    def executor(self, kind: TaskKind) -> Executor:
        """Returns an executor for the tasks of one kind."""

    def close(self) -> None:
        """Ends what the executors share. The cluster can be used again."""
