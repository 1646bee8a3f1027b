"""Measures the CPU time of starting Ray tasks: of a process that starts them, and of a driver that sends them to dispatchers.

    python -m tests.benchmarks.dispatchers [--calls 20000] [--dispatchers 4] [--rounds 3]

The first way starts calls without an end, and counts the seconds of all threads of this process. A call runs two tasks that do
nothing. In the second way, the dispatchers answer at once, and start no Ray tasks: on a large cluster, the driver receives the
records of many calls in one message too. The difference of the two is the time that dispatchers take from the driver.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import psutil
import ray
from heliostat.tasks import dispatchers
from heliostat.tasks.clusters import Executor, Task, TaskKind
from heliostat.tasks.dispatchers import DispatchedTasks, Dispatcher, Dispatchers, SentCall
from heliostat.tasks.ray_tasks import RayTasks
from heliostat.tasks.spill import SpilledRun

from tests.benchmarks import harness

ROOT = Path(__file__).parents[2]
RECORD = {"seconds": 0.0, "wall": 0.0, "files": ["a" * 50] * 3, "rows": 10, "runs": [], "reasons": {"short": 1}}
RUNS = [SpilledRun(f"3f/{'a' * 60}{i}", 1000, 100_000) for i in range(4)]
UNDER_WAY = 4000  # calls: the driver of a large cluster has at least as many


class AnsweringDispatcher(Dispatcher):
    """Answers each call at once, with a record for each task."""

    def begin(self, kind: TaskKind, arguments: tuple[Any, ...], calls: list[SentCall]) -> None:
        with self.lock:
            self.failed += [(call.number, [dict(RECORD) for _ in call.tasks]) for call in calls]

    def ended(self, wait_s: float) -> list[tuple[int, dispatchers.Result]]:
        time.sleep(dispatchers.LOOK_S)
        with self.lock:
            results, self.failed = self.failed, []
        return results


def nothing(*arguments: Any, **shared: Any) -> list[dict[str, Any]]:
    return [dict(RECORD) for _ in arguments[-1]]


def seconds() -> float:
    times = psutil.Process().cpu_times()
    return times.user + times.system


def ran(executor: Executor, count: int, names: Any) -> float:
    """Runs calls, at most UNDER_WAY at a time, and returns the CPU seconds of this process per call."""
    before, left = seconds(), set[Any]()
    for number in range(count):
        while len(left) >= UNDER_WAY:
            receive(executor, left)
        tasks = [Task(f"{number:032}", {"first": number, "runs": RUNS})] * 2
        left.add(executor.start(("work", "run", "kind"), tasks, {"names": names}, 1, None))
    while left:
        receive(executor, left)
    return (seconds() - before) / count


def receive(executor: Executor, left: set[Any]) -> None:
    for reference in executor.ended(list(left), 10.0):
        left.discard(reference)
        executor.records(reference)


def main() -> None:
    options = harness.arguments(__doc__, calls=20_000, dispatchers=4, rounds=3)
    environment = {"PYTHONPATH": f"{ROOT}/platform:{ROOT}"}
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, runtime_env={"env_vars": environment})
    kind, names = TaskKind("some", nothing, dict), ray.put(["x" * 60] * 1000)
    dispatchers.Dispatcher = AnsweringDispatcher  # type: ignore[misc]
    sender = Dispatchers(options.dispatchers, {})
    sent = DispatchedTasks(kind, sender)
    ran(sent, UNDER_WAY, names)
    ran(RayTasks(kind), 200, names)
    harness.head("round", "microseconds per call, alone", "microseconds per call, with dispatchers")
    for number in range(options.rounds):
        alone, through = ran(RayTasks(kind), options.calls // 20, names), ran(sent, options.calls, names)
        harness.row(number + 1, f"{alone * 1e6:.0f}", f"{through * 1e6:.0f}")
    sender.close()


if __name__ == "__main__":
    main()
