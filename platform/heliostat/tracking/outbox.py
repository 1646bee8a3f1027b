"""Queues points for MLflow in order until the store has them, and sends each step of a metric once.

It doesn't send points that MLflow already has from earlier attempts or commands. While the store is unreachable, the run's folder
also has a copy of the queue (`unlogged.jsonl`). The run's next command finds it there, even if this command is killed.

System metrics have their own queue, which is sent last. They never displace a loss or a score.
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

LIMIT = 500_000  # most points that may wait, about 100 MB; above it the oldest are dropped
SYSTEM_LIMIT = 50_000  # the same for system metrics
METRICS, SYSTEM_METRICS = "metrics", "system metrics"  # the two queues
BATCH = 1000  # the most metrics that MLflow takes in one call
HOPELESS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")  # MLflow's final rejections


WAITING = Format(
    Point,
    "list of points that wait for MLflow",
    check=lambda point: None if 0 <= point.at < 2.0**36 and 0 <= point.step < 2**53 else "its time or its step is missing",
    fix="Delete the file to continue without them",
)


class Outbox:
    """Holds the points of one run that wait for MLflow."""

    def __init__(self, run: Location, send: Callable[[list[Point]], None], known: Callable[[], dict[str, int]]) -> None:
        """Starts empty. `send` sends at most BATCH points to the store; `known` returns the store's last place of each metric."""
        self._file, self._send, self._known = run.join(run_folder.UNLOGGED), send, known
        self._last: dict[str, int] | None = None  # last place by metric; None: unknown
        self._waiting: dict[str, deque[Point]] = {METRICS: deque(), SYSTEM_METRICS: deque()}  # in the order of sending
        self._given_up = dict.fromkeys(self._waiting, 0)
        self._loaded = self._kept = False

    def _load(self) -> None:
        """Loads the points that an earlier command couldn't log, once, before all other points."""
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
        """Queues points, and drops the oldest ones above the limits."""
        for point in points:
            self._queue(point).append(point)
        for what, queue in self._waiting.items():
            while len(queue) > (LIMIT if what == METRICS else SYSTEM_LIMIT):
                queue.popleft()
                self._given_up[what] += 1

    def _queue(self, point: Point) -> deque[Point]:
        return self._waiting[SYSTEM_METRICS if point.key.startswith(SYSTEM) else METRICS]

    def precede(self, points: list[Point]) -> None:
        """Puts points of earlier steps before all waiting points."""
        self._load()
        self._waiting[METRICS].extendleft(reversed(points))

    def flush(self) -> int:
        """Sends all waiting points, and returns how many were new. Raises the store's errors; unsent points keep waiting."""
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
                self._last = None  # the store may have them: perhaps only its answer was lost
                raise
            log.error("MLflow rejected %d metrics: %s", len(points), e)

    def keep(self) -> None:
        """Writes the waiting points to the run's folder.

        Writes the file even if no point waits, because it marks that MLflow doesn't have the whole run.
        """
        self._load()
        self._file.write("".join(json.dumps(point) + "\n" for queue in self._waiting.values() for point in queue).encode())
        self._kept = True
