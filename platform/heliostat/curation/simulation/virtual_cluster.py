"""Implements a cluster with a virtual clock: tasks take their time and records from a profile, and fail as in a large cluster.

The driver's own processor time, and the time of Ray's calls, pass on the virtual clock too. So a slow driver delays the tasks.
"""

from __future__ import annotations

import heapq
import json
import math
import random
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import ray.exceptions
import xxhash

from heliostat.curation.careful import Careful
from heliostat.curation.simulation.images import fetched
from heliostat.curation.simulation.profile import Profile, Sizes, synthesized
from heliostat.curation.simulation.requests import NODE_BYTES_PER_S, Requests
from heliostat.tasks import care, dispatchers, ray_tasks
from heliostat.tasks.care import Care, TaskPlace
from heliostat.tasks.clusters import Executor, Task, TaskKind
from heliostat.tasks.ray_tasks import GATHER_S, MANY

RAY_CALL_S = 950e-6  # CPU seconds of a process per Ray task, in all threads of Ray 2: 946 to 999 microseconds on two busy cores
SEND_S = 30e-6  # CPU seconds of the driver per call through a dispatcher, in all threads: 19 to 27 microseconds
DISPATCH_S = RAY_CALL_S + 150e-6  # CPU seconds of a dispatcher per call
WAIT_S = 0.4e-6  # CPU seconds of a wait per reference: 2.8 to 5.4 ms for 8,000 references
STARTED_S = 0.02  # seconds for a node to start a task in a process that exists
AWAY_S = 300.0  # seconds until a lost node is replaced
DAY_S = 86400.0


@dataclass(frozen=True)
class SimulatedFaults:
    """Configures the failures of a simulated cluster. The shares are per task."""

    node_days: float = 60.0
    """Days after which a node is lost, on average."""
    poison: float = 2e-5
    """Share of the tasks with a document that always ends their process."""
    slow: float = 0.01
    """Share of the calls that take up to ten times as long."""
    bursts_per_day: float = 6.0
    """Number of times per day when the store answers 503 for a minute."""


@dataclass
class KindTimes:
    """Holds the virtual times of one call for tasks: begin, end, number of tasks and of starts, CPU seconds, longest task."""

    name: str
    begin: float
    end: float = 0.0
    tasks: int = 0
    starts: int = 0
    seconds: float = 0.0
    longest: float = 0.0


class _Paused(AbstractContextManager[None]):
    """Stops the measurement of the driver's processor time. A class, because a generator would take longer than the rest."""

    def __init__(self, cluster: VirtualCluster) -> None:
        self.cluster, self.left = cluster, time.thread_time()

    def __enter__(self) -> None:
        self.count()

    def count(self) -> None:
        """Counts the driver's processor time since the last count or context."""
        now = time.thread_time()
        passed, self.left = now - self.left, now
        self.cluster.driver_seconds += passed
        self.cluster.clock += passed

    def __exit__(self, *error: object) -> None:
        self.left = time.thread_time()


@dataclass
class VirtualCluster:
    """Simulates `node_count` nodes with `cpus` CPUs each."""

    node_count: int
    cpus: int
    memory: int
    profile: Profile
    faults: SimulatedFaults = field(default_factory=SimulatedFaults)
    seed: int = 0
    clock: float = 0.0
    """Virtual seconds since the start."""
    driver_seconds: float = 0.0
    """Processor seconds of the driver's own code."""
    ray_seconds: float = 0.0
    sizes: Sizes = field(default_factory=Sizes)
    requests: Requests = field(default_factory=Requests)
    kinds: list[KindTimes] = field(default_factory=list)
    executors: list[VirtualExecutor] = field(default_factory=list)
    lost: int = 0
    """Tasks that ended because their node was lost."""
    poisoned: int = 0
    """Tasks that ended because of a document."""
    stretched: int = 0
    """Calls that were slow, and tasks that waited for the store."""
    backups: int = 0
    """Calls that repeated a slow call."""
    limited: dict[str, float] = field(default_factory=dict)
    """Seconds of the tasks that fetch URLs, by the limit that decides a task's time."""
    dispatched: int = 0
    """Calls that dispatchers started."""
    _calls: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dispatchers = [0.0] * dispatchers.needed(self.node_count * self.cpus)
        """Times from which each dispatcher is free, as a heap."""
        self._paused, drawn = _Paused(self), random.Random(self.seed)
        self.failures = [_times(drawn, self.faults.node_days * DAY_S) for _ in range(self.node_count)]
        self.bursts = _times(drawn, DAY_S / self.faults.bursts_per_day)

    def simulating(self) -> AbstractContextManager[None]:
        """Returns a context whose processor time doesn't count. Adds the processor time of the driver's thread since the last
        such context to the clock. RAY_CALL_S covers Ray's threads."""
        return self._paused

    def spend(self, seconds: float) -> None:
        """Lets Ray's calls take some of the driver's processor time."""
        self.ray_seconds += seconds
        self.clock += seconds

    def starts(self) -> float:
        """Lets the driver start a call, or send it to a dispatcher. Returns the time at which Ray has the call."""
        if not self.dispatchers:
            self.spend(RAY_CALL_S)
            return self.clock
        self.spend(SEND_S)
        self.dispatched += 1
        at = max(self.clock, self.dispatchers[0]) + DISPATCH_S
        heapq.heapreplace(self.dispatchers, at)
        return at

    def now(self) -> float:
        self._paused.count()
        return self.clock

    def sleep(self, seconds: float) -> None:
        with self.simulating():
            self.clock += seconds

    def nodes(self, labels: Mapping[str, str], resource: str) -> list[int]:
        return [{"CPU": self.cpus, "memory": self.memory}.get(resource, 0)] * self.node_count

    def share(self, value: object) -> object:
        with self.simulating():
            return self.sizes.share(value, value)

    def executor(self, kind: TaskKind) -> Executor:
        with self.simulating():
            call = self._calls[kind.name] = self._calls.get(kind.name, -1) + 1
            self.kinds.append(KindTimes(kind.name, self.clock))
            self.executors.append(VirtualExecutor(self, kind, call, self.kinds[-1]))
            return self.executors[-1]

    def close(self) -> None:
        """Does nothing: a simulation ends with its driver."""

    def busy(self) -> Iterator[tuple[float, int]]:
        """Yields the end and the node of each call that runs now, such as calls whose backup was faster."""
        for executor in self.executors:
            yield from ((end, node) for end, node in executor.nodes.values() if end > self.clock)

    def failure(self, node: int, begin: float, end: float) -> float | None:
        """Returns the time between `begin` and `end` at which a node is lost, if there is one."""
        return _within(self.failures[node], begin, end)

    def free(self, node: int, begin: float) -> float:
        """Returns the time from which a node runs a task that could begin at `begin`."""
        place = bisect_right(self.failures[node], begin)
        return max(begin, self.failures[node][place - 1] + AWAY_S) if place else begin


class VirtualExecutor:
    """Runs the tasks of one kind on a virtual cluster. A reference is the number of a start."""

    ready = True

    def __init__(self, cluster: VirtualCluster, kind: TaskKind, call: int, times: KindTimes) -> None:
        self.cluster, self.kind, self.call, self.times = cluster, kind, call, times
        self.start_s = dispatchers.START_S if cluster.dispatchers else ray_tasks.START_S
        self.slots: list[tuple[float, int]] = []
        self.results: dict[int, bytes | Exception] = {}
        """The records of each call, as JSON: a dictionary has several times as many bytes."""
        self.ends: list[tuple[float, int]] = []
        self.nodes: dict[int, tuple[float, int]] = {}
        """Time of the end, and node, of each call whose records the driver hasn't read."""
        self.recorded: dict[str, tuple[float, dict[str, Any]]] = {}
        """Records of tasks that share a call, and their times, until the driver has them. They count even if the call fails."""
        self.keys: dict[int, list[str]] = {}
        self.copies = Counter[str]()
        """Number of backups of each call, by the key of its first task."""

    def start(self, arguments: tuple[Any, ...], tasks: list[Task], shared: Mapping[str, object], cpus: int, memory: int | None,
              backup: bool = False) -> Any:  # fmt: skip
        cluster = self.cluster
        with cluster.simulating():
            started = cluster.starts()
            cluster.backups += backup
            if not self.slots:
                self.slots, self.times.begin = self._slots(cpus, memory), cluster.clock
            free, node = heapq.heappop(self.slots)
            begin = cluster.free(node, max(free, started))
            self.times.starts += 1
            reference = self.times.starts
            slow = self._slow(tasks[0], backup)
            cluster.stretched += slow > 1 and not backup
            result, end = self._simulated(arguments[1], tasks, shared, cpus, node, begin + STARTED_S, slow)
            heapq.heappush(self.slots, (end, node))
            self.nodes[reference] = end, node
            self.results[reference] = result if isinstance(result, Exception) else json.dumps(result).encode()
            self.keys[reference] = [task.key for task in tasks]
            heapq.heappush(self.ends, (end, reference))
            self.times.longest = max(self.times.longest, end - begin)
            return reference

    def _simulated(self, run: str, tasks: list[Task], shared: Mapping[str, object], cpus: int, node: int, begin: float,
                   slow: float) -> tuple[list[dict[str, Any]] | Exception, float]:  # fmt: skip
        """Returns what a call gives that begins on a node at `begin`, and the time at which it ends. Tasks that end before their
        node is lost, or before a task ends the process, have a record."""
        cluster, records, at = self.cluster, list[dict[str, Any]](), begin
        for task in tasks:
            written, known = self.recorded.get(task.key, (math.inf, {}))
            if written <= at:
                records.append(known)
                continue
            read = cluster.sizes.read(task)
            record = synthesized(self.kind, self.call, task, read, cluster.profile, cluster.sizes)
            files, loaded = cluster.sizes.loads(self.kind, task, read)
            footers = files if at == begin else files - cluster.sizes.shared_files(task)
            stored = cluster.sizes.stored(task, loaded)
            seconds = cluster.requests.of_task(self.kind.name, task, record, files, footers, loaded, stored, at, cpus)
            end = at + self._on_web(task, self._stretched(at, seconds * slow))
            fault = self._poison(task, shared, record)
            if (gone := cluster.failure(node, at, at + (end - at) / 2 if fault else end)) is not None:
                cluster.lost += 1
                return ray.exceptions.NodeDiedError("the node was lost"), gone
            if fault:
                cluster.poisoned += 1
                return fault, at + (end - at) / 2
            record = record | {"wall": round(end - at, 3), "run": run}
            records.append(record)
            if len(tasks) > 1 and end < written:
                self.recorded[task.key] = end, record
            at = end
        return records, at

    def send(self) -> None:
        """Does nothing: each call is sent when it starts."""

    def ended(self, references: list[Any], wait_s: float) -> list[Any]:
        cluster, ended = self.cluster, list[Any]()
        with cluster.simulating():
            if not cluster.dispatchers:
                cluster.spend(2 * len(references) * WAIT_S)
            if not self.ends or self.ends[0][0] > cluster.clock + wait_s:
                cluster.clock += wait_s
                return []
            cluster.clock = max(cluster.clock, self.ends[0][0]) + (GATHER_S if len(references) > MANY else 0.0)
            while self.ends and self.ends[0][0] <= cluster.clock:
                ended.append(heapq.heappop(self.ends)[1])
            return ended

    def records(self, reference: Any) -> list[dict[str, Any]]:
        with self.cluster.simulating():
            result, keys = self.results.pop(reference), self.keys.pop(reference)
            del self.nodes[reference]
            if isinstance(result, Exception):
                raise result
            for key in keys:
                self.recorded.pop(key, None)
            records: list[dict[str, Any]] = json.loads(result)
            self.times.tasks += len(records)
            self.times.seconds += sum(record["seconds"] for record in records)
            self.times.end = self.cluster.clock
            return records

    def withdraw(self, references: list[Any]) -> list[Any]:
        return []

    def end(self, references: list[Any]) -> int:
        return 0

    def _slots(self, cpus: int, memory: int | None) -> list[tuple[float, int]]:
        each = self.cluster.cpus // cpus
        if memory:
            each = min(each, max(1, self.cluster.memory // memory))
        free = [[self.cluster.clock] * each for _ in range(self.cluster.node_count)]
        for end, node in self.cluster.busy():
            heapq.heapreplace(free[node], max(free[node][0], end))
        slots = [(at, node) for node, ends in enumerate(free) for at in ends]
        heapq.heapify(slots)
        return slots

    def _slow(self, task: Task, backup: bool) -> float:
        """Returns how many times longer a call takes. Each backup draws again, because it runs on another node."""
        if backup:
            self.copies[task.key] += 1
        drawn = _drawn(task.key, f"slow backup {self.copies[task.key]}" if backup else "slow")
        return 1 + 9 * drawn / self.cluster.faults.slow if drawn < self.cluster.faults.slow else 1.0

    def _on_web(self, task: Task, seconds: float) -> float:
        """Returns the seconds of a task. For a task that fetches URLs, the narrowest limit decides: the web, or the task's own
        seconds."""
        web, description = self.cluster.profile.web, fetched(task)
        if web is None or description is None:
            return seconds
        limits = {"CPUs": seconds, **web.limits(description, NODE_BYTES_PER_S)}
        narrowest = max(limits, key=lambda name: limits[name])
        self.cluster.limited[narrowest] = self.cluster.limited.get(narrowest, 0.0) + limits[narrowest]
        return limits[narrowest]

    def _stretched(self, begin: float, seconds: float) -> float:
        """Returns the seconds of a task, with a minute more if the store answers 503 meanwhile."""
        burst = _within(self.cluster.bursts, begin, begin + seconds) is not None
        self.cluster.stretched += burst
        return seconds + (60.0 if burst else 0.0)

    def _poison(self, task: Task, shared: Mapping[str, object], record: dict[str, Any]) -> Exception | None:
        """Ends a task's process if the task has a document that always does this. Writes the notes of such a task, so that the
        driver finds the document. Then the document is left out."""
        if not task.careful or _drawn(task.key, "poison") >= self.cluster.faults.poison:
            return None
        instructions = shared.get("care")
        if isinstance(instructions, Care) and instructions.crashed:
            record["reasons"] = record.get("reasons", {}) | {care.CRASHED: len(instructions.crashed)}
            record["examples"] = record.get("examples", {}) | {care.CRASHED: [crash.id for crash in instructions.crashed]}
            return None
        if isinstance(instructions, Care):
            alone = instructions.suspect is not None
            Careful(instructions).note(TaskPlace(0, -1, alone, "poison" if alone else "", "stage" if alone else ""))
        return ray.exceptions.WorkerCrashedError()


def _drawn(key: str, what: str) -> float:
    return xxhash.xxh64_intdigest(f"{key} {what}".encode()) / (1 << 64)


def _times(drawn: random.Random, mean_s: float) -> list[float]:
    """Draws the times of independent events in the first 1,000 days."""
    times, at = list[float](), 0.0
    while (at := at + drawn.expovariate(1 / mean_s)) < 1000 * DAY_S:
        times.append(at)
    return times


def _within(times: Sequence[float], begin: float, end: float) -> float | None:
    """Returns the first of some ascending times after `begin`, up to `end`."""
    place = bisect_right(times, begin)
    return times[place] if place < len(times) and times[place] <= end else None
