"""Measures how a run uses its time: `Ledger` on a worker, `LedgerRecorder` on the driver. `runs.goodput` defines the parts.

A worker's ledger is always in exactly one part. One clock reading ends a part and begins the next, so the parts add up exactly to
the worker's time. Each event of rank 0 contains the totals until then, so no time is missing if an event is lost. The loop's time
in the engine counts as `computing`. This is right on GPUs too, because the host is at most one step ahead of the device
(`training.worker.step`).
"""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

from heliostat.errors import HeliostatError
from heliostat.runs import goodput
from heliostat.runs.events import Event, ModelPhase, Phase, Saved, Steps
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage import run_folder
from heliostat.storage.locations import Location

log = logging.getLogger(__name__)

EVERY_S = 5.0  # maximum age of the ledger file of a driver that was killed
RETRY_S = 30.0  # seconds between two attempts to read an unreadable ledger


class Ledger:
    """Books a worker's time by part. `switch(part)` books the time from now on to this part. `with ledger(part): ...` books the
    time within the context to this part.

    Parts don't overlap: an inner part interrupts the outer part.
    """

    def __init__(self, part: str) -> None:
        self.part = part
        self._seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    def switch(self, part: str) -> None:
        now = time.perf_counter()
        self._seconds[self.part] += now - self._since
        self.part, self._since = part, now

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        outer = self.part
        self.switch(part)
        try:
            yield
        finally:
            self.switch(outer)

    def move(self, source: str, target: str, seconds: float) -> None:
        """Moves booked seconds from one part to another. Use this method for seconds whose right part is known only later."""
        self._seconds[source] -= seconds
        self._seconds[target] += seconds

    def compiled(self, first: bool) -> None:
        """Separates compiling from computing. Call this after the first step and after the second step.

        The first step is booked completely as compiling. The time of the second step then shows how much of the first step was
        computing.
        """
        if not first:
            spent = self.totals()
            self.move("compiling", "computing", min(spent["compiling"], spent["computing"]))
        self.switch("computing")

    def totals(self) -> dict[str, float]:
        """Returns the seconds by part until now."""
        self.switch(self.part)
        return dict(self._seconds)


class LedgerRecorder:
    """Keeps the run's time ledger on the driver, from the events in the mailbox. Each attempt has one file.

    A separate thread writes the files. If the store rejects a file, the recorder only logs a warning, so that the ledger never
    stops a run.
    """

    def __init__(self, run: Location, started: float, start_step: int, workers: int) -> None:
        """Begins the ledger with a first attempt. `started`: wall-clock time of the command's start."""
        self.run = run
        self.attempts = [self._attempt(started, start_step, workers)]
        self._begun = [time.monotonic() - max(0.0, time.time() - started)]  # start of each attempt, by a monotonic clock
        self._earlier: list[RecordedAttempt] | None = None  # attempts of earlier commands; None until they are read
        self._reading: Future[list[RecordedAttempt]] | None = None
        self._again = 0.0  # time to read earlier attempts again; 0.0 before the first read
        self._joined: float | None = None  # time when this attempt's rank 0 began to count
        self._head: dict[str, float] = {}  # seconds by part until that time
        self._placing: list[float] = []  # times when workers were requested from the pool
        self._saved_at: set[int] = set()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._writing: Future[None] | None = None
        self._due = 0.0  # time to write the file again

    def event(self, event: Event) -> None:
        """Processes an event of the workers. If the event has totals in `ledger`, they update the attempt's parts."""
        at, now = event.at, self.attempts[-1]
        phase = event.phase if isinstance(event, Phase) else ""
        if self._joined is None and phase not in ("placing", "model"):
            return  # a late event of workers that have failed
        if phase == "placing" and self._joined is not None and at < now.known:
            return  # an event of the driver that arrived after the workers' own events
        if phase in ("placing", "model") and self._joined is not None:
            self.restart(at)
            now = self.attempts[-1]
        if phase == "placing":
            self._placing.append(at)
            self._note("queued", at)
        elif isinstance(event, ModelPhase):
            self._join(event)
        elif phase in ("step", "ended"):
            now.pending = "lost" if phase == "step" else "idle"
        if event.ledger is not None:
            self._count(event.ledger)
        if isinstance(event, Steps):
            self._mark(event.done)
        elif isinstance(event, Saved):
            self._saved_at.add(event.step)
        self.beat(force=isinstance(event, Saved))

    def _attempt(self, started: float, start_step: int, workers: int, restart: bool = False) -> RecordedAttempt:
        mine, driver = uuid.uuid4().hex[:8], (socket.gethostname(), os.getpid())
        return RecordedAttempt(mine, started, started, started, start_step, workers, restart, *driver)

    def _note(self, pending: str, at: float) -> None:
        """Books the time until `at` to the present pending part while there is no worker yet. After this, `pending` is the
        pending part."""
        now, at = self.attempts[-1], max(at, self.attempts[-1].known)  # another machine's clock may be slow
        now.parts[now.pending] = now.parts.get(now.pending, 0.0) + at - now.known
        now.known, now.pending = at, pending

    def _join(self, event: ModelPhase) -> None:
        """Books the time until the workers began to run: as `queued`, then as `starting`. `event.queued_s`: seconds for which the
        last requested placement group waited."""
        now, at = self.attempts[-1], event.at
        self._joined = max(now.known, at - sum((event.ledger or {}).values()))
        if self._placing:
            queued = self._placing[-1] - self._placing[0] + event.queued_s
            self._note("starting", min(self._placing[0] + queued, self._joined))
        self._note("starting", self._joined)
        now.start_step, now.workers = event.start_step, event.workers
        self._head = dict(now.parts)

    def _count(self, totals: dict[str, float]) -> None:
        now = self.attempts[-1]
        assert self._joined is not None
        now.parts = {p: self._head.get(p, 0.0) + totals.get(p, 0.0) for p in {*self._head, *totals}}
        now.known = self._joined + sum(totals.values())
        now.seen = max(now.seen, now.known)

    def _mark(self, step: int) -> None:
        """Adds a mark: a step, and the computing seconds until this step. Of the earlier marks, keeps only the marks at
        checkpoints, because later attempts may begin there."""
        now = self.attempts[-1]
        if now.marks and now.marks[-1][0] not in self._saved_at:
            now.marks.pop()
        now.marks.append((step, now.parts.get("computing", 0.0)))

    def restart(self, at: float | None = None, outcome: str = "failed", reason: str = "") -> None:
        """Closes the attempt because the workers have ended (now, or at `at`), and begins the next attempt."""
        at = at or time.time()
        failed = self.attempts[-1]
        failed.reason = reason
        if failed.pending == "idle":  # the workers ended without an error, to begin again
            failed.pending = "restarting"
        self._end(outcome, max(at, failed.known))
        self.attempts.append(self._attempt(failed.seen, failed.reached, failed.workers, restart=True))
        self._begun.append(time.monotonic())
        self._joined, self._placing, self._saved_at = None, [], set()

    def _end(self, outcome: str, at: float) -> None:
        ended = self.attempts[-1]
        ended.seen, ended.outcome = max(at, ended.known), outcome
        self._write(ended)

    def beat(self, force: bool = False) -> None:
        """Writes the attempt's file if the file is out of date, unless the last write is still running. Call this method
        often."""
        now = time.monotonic()
        self._due = min(self._due, now if force else self._due)
        if now >= self._due and (self._writing is None or self._writing.done()):
            self._due = now + EVERY_S
            self._seen()
            self._write(self.attempts[-1])

    def _seen(self) -> None:
        self.attempts[-1].seen = max(self.attempts[-1].known, time.time())

    def _write(self, attempt: RecordedAttempt) -> None:
        place, data = self.run.join(run_folder.LEDGER, attempt.name), attempt.dump()
        self._writing = self._thread.submit(_store, place, data)

    def report(self) -> goodput.GoodputReport:
        """Computes the run's goodput until now, over all attempts, including attempts of earlier commands."""
        return goodput.report(self._all())

    def spent(self) -> tuple[float, float]:
        """Computes two numbers of hours until now, over all commands of the run: the run's hours, and the hours for which its
        workers used resources.

        Hours of earlier commands come from the ledger. Hours of this command come from a monotonic clock.
        """
        earlier, ends = self._before(), [*self._begun[1:], time.monotonic()]
        attempts = [*earlier, *self.attempts]
        hours = [(a.seen - a.started) / 3600 for a in earlier]
        hours += [(end - begun) / 3600 for begun, end in zip(self._begun, ends, strict=True)]
        worker_hours = [a.workers * max(0.0, h - a.parts.get("queued", 0.0) / 3600) for a, h in zip(attempts, hours, strict=True)]
        return sum(hours), sum(worker_hours)

    @property
    def complete(self) -> bool:
        """Returns whether the attempts of earlier commands have been read."""
        return self._earlier is not None

    def _all(self) -> list[RecordedAttempt]:
        self._seen()
        return [*self._before(), *self.attempts]

    def _before(self) -> list[RecordedAttempt]:
        """Returns the attempts of earlier commands. If the first read fails, the thread tries again every RETRY_S seconds."""
        if self._earlier is None:
            if not self._again:
                self._take(partial(goodput.read, self.run))
            elif self._reading is None and time.monotonic() >= self._again:
                self._reading = self._thread.submit(goodput.read, self.run)
            elif self._reading is not None and self._reading.done():
                reading, self._reading = self._reading, None
                self._take(reading.result)
        return self._earlier or []

    def _take(self, read: Callable[[], list[RecordedAttempt]]) -> None:
        mine, first = {a.id for a in self.attempts}, not self._again
        try:
            self._earlier = [a for a in read() if a.id not in mine]
        except (HeliostatError, OSError) as e:
            self._again = time.monotonic() + RETRY_S
            if first:
                log.warning(
                    "can't read the run's ledger. Until heliostat can read the ledger, goodput and limits count only "
                    "this command: %s",
                    e,
                )
            return
        if not first:
            log.warning("can read the run's ledger again. From now on, goodput and limits count all commands")

    def close(self, outcome: str, reason: str = "") -> None:
        """Closes the ledger at the end of the command, and waits until its file is written."""
        self.attempts[-1].reason = reason
        self._end(outcome, time.time())
        self._thread.shutdown(wait=True)


def _store(place: Location, data: bytes) -> None:
    try:
        place.write(data)
    except (HeliostatError, OSError) as e:
        log.warning("can't update the run's ledger yet: %s", e)
