"""Keeps points on their way to MLflow in order until the store has them, and sends each step of a metric once.

What MLflow already holds of a metric, from earlier attempts or commands, is not sent again. While the store is away, what waits
is kept in the run's folder too (`unlogged.jsonl`), so that the run's next command finds it even if this one is killed. System
metrics have a queue of their own: however many they are, no loss or score is given up for them, and losses and scores go first.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterable
from itertools import islice

from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.storage.records import Format
from heliostat.tracking.metrics import SYSTEM, Point, renamed

log = logging.getLogger(__name__)

LIMIT = 500_000  # points that may wait, some 100 MB; beyond it the oldest are given up
SYSTEM_LIMIT = 50_000  # the same of system metrics
METRICS, SYSTEM_METRICS = "metrics", "system metrics"  # what waits
BATCH = 1000  # the most metrics that MLflow takes in one call
HOPELESS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")  # MLflow's codes for what it will never take


WAITING = Format(
    Point,
    "list of points that wait for MLflow",
    check=lambda point: None if 0 <= point.at < 2.0**36 and 0 <= point.step < 2**53 else "its time or its step is missing",
    fix="Delete the file to continue without them",
)


class Outbox:
    def __init__(self, run: Location, send: Callable[[list[Point]], None], known: Callable[[], dict[str, int]]) -> None:
        """Starts empty: `send` gives at most BATCH points to the store; `known` asks it for the last place of every metric."""
        self._file, self._send, self._known = run.join(run_folder.UNLOGGED), send, known
        self._last: dict[str, int] | None = None  # place by metric; None: to be asked
        self._waiting: dict[str, deque[Point]] = {METRICS: deque(), SYSTEM_METRICS: deque()}  # in the order in which they go
        self._given_up = dict.fromkeys(self._waiting, 0)
        self._loaded = self._kept = False

    def _load(self) -> None:
        """Loads, once, the points that an earlier command could not log, ahead of all others."""
        if self._loaded:
            return
        try:
            earlier = WAITING.read_lines(self._file)
            self._kept = True
        except FileNotFoundError:
            earlier = []
        for point in reversed(earlier):
            self._queue(point).appendleft(point._replace(key=renamed(point.key)))
        self._loaded = True

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def add(self, points: Iterable[Point]) -> None:
        for point in points:
            self._queue(point).append(point)
        for what, queue in self._waiting.items():
            while len(queue) > (LIMIT if what == METRICS else SYSTEM_LIMIT):
                queue.popleft()
                self._given_up[what] += 1

    def _queue(self, point: Point) -> deque[Point]:
        return self._waiting[SYSTEM_METRICS if point.key.startswith(SYSTEM) else METRICS]

    def precede(self, points: list[Point]) -> None:
        """Puts points of earlier steps before all that waits."""
        self._load()
        self._waiting[METRICS].extendleft(reversed(points))

    def flush(self) -> int:
        """Sends all that waits, and returns how much was new; raises what the store raises, and keeps what it did not take."""
        self._load()
        sent = sum([self._flush(queue) for queue in self._waiting.values()])
        if self._kept:
            self._file.delete()
            self._kept = False
        for what, count in self._given_up.items():
            if count:
                log.error("dropped %d %s, the oldest that waited for MLflow", count, what)
                self._given_up[what] = 0
        return sent

    def _flush(self, queue: deque[Point]) -> int:
        sent = 0
        while queue:
            if self._last is None:
                self._last = self._known()
            batch, places, new = list(islice(queue, BATCH)), dict(self._last), []
            for point in batch:
                if point.key not in places or point.place > places[point.key]:
                    places[point.key] = point.place
                    new.append(point)
            if new:
                self._deliver(new)
            self._last = places
            sent += len(new)
            for _ in batch:
                queue.popleft()
        return sent

    def _deliver(self, points: list[Point]) -> None:
        try:
            self._send(points)
        except Exception as e:
            if getattr(e, "error_code", "") not in HOPELESS:
                self._last = None  # it may have taken them, and only its answer was lost
                raise
            log.error("MLflow rejected %d metrics: %s", len(points), e)

    def keep(self) -> None:
        """Writes what waits to the run's folder.

        The file is written even if nothing waits, because it marks that MLflow does not have the whole run.
        """
        self._load()
        self._file.write("".join(json.dumps(point) + "\n" for queue in self._waiting.values() for point in queue).encode())
        self._kept = True
