"""Queues points for MLflow, in order, until the store has them. Sends the point of a metric at a step only once.

The outbox doesn't send points that MLflow already has from earlier attempts or commands. While the store is unreachable, a copy
of the queue is in the run's folder (`unlogged.jsonl`). So even if this command is killed, the run's next command reads the copy.

System metrics have their own queue, which is sent last. So system metrics never displace a loss or a score.
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

LIMIT = 500_000  # maximum number of waiting points, about 100 MB; above this limit, the oldest points are dropped
SYSTEM_LIMIT = 50_000  # this limit for system metrics
METRICS, SYSTEM_METRICS = "metrics", "system metrics"  # names of the two queues
BATCH = 1000  # maximum number of metrics that MLflow accepts in one call
HOPELESS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "INVALID_STATE")  # MLflow's errors that a retry can't fix


WAITING = Format(
    Point,
    "list of points that wait for MLflow",
    check=lambda point: None if 0 <= point.at < 2.0**36 and 0 <= point.step < 2**53 else "the point's time or step is missing",
    fix="Delete the file to continue without these points",
)


class Outbox:
    """Queues the points (metric, step, value) of one run until MLflow has them."""

    def __init__(self, run: Location, send: Callable[[list[Point]], None], known: Callable[[], dict[str, int]]) -> None:
        """Starts with empty queues. `send` sends at most BATCH points to the store. `known` returns the last coordinate of each
        metric in the store."""
        self._file, self._send, self._known = run.join(run_folder.UNLOGGED), send, known
        self._last: dict[str, int] | None = None  # last coordinate by metric; None if it is unknown
        self._waiting: dict[str, deque[Point]] = {METRICS: deque(), SYSTEM_METRICS: deque()}  # in the order of sending
        self._given_up = dict.fromkeys(self._waiting, 0)
        self._loaded = self._kept = False

    def _load(self) -> None:
        """Loads the points that an earlier command couldn't log, and queues them before all other points. Does this only
        once."""
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
        """Queues points. If a queue exceeds its limit, drops the oldest points."""
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
        """Sends all waiting points, and returns the number of points that were new. Raises the store's errors; unsent points
        keep waiting."""
        self._load()
        sent = sum([self._flush(queue) for queue in self._waiting.values()])
        if self._kept:
            self._file.delete()
            self._kept = False
        for what, count in self._given_up.items():
            if count:
                log.error("dropped the oldest %d %s that waited for MLflow, because too many were waiting", count, what)
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
                self._last = None  # the store may have the points: perhaps only its answer was lost
                raise
            log.error("MLflow rejected %d metrics: %s", len(points), e)

    def keep(self) -> None:
        """Writes the waiting points to the run's folder.

        Writes the file even if no point waits. The file then shows that MLflow doesn't have the complete run.
        """
        self._load()
        self._file.write("".join(json.dumps(point) + "\n" for queue in self._waiting.values() for point in queue).encode())
        self._kept = True
