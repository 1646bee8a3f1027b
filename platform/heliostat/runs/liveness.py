"""Tells whether a run's driver is alive, from the heartbeat in its ledger: every few seconds, with its host and process.

That at most one driver is alive at a time is ensured by the lease (`lease`).
"""

from __future__ import annotations

import socket
import time

import psutil

from heliostat.runs import goodput
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage.locations import Location

GONE_S = 120.0  # after which a driver on another host is taken for dead, by its clock, which may be slow


def lives(attempt: RecordedAttempt) -> bool:
    """Tells whether the driver of an attempt without an outcome is alive, as far as can be known without waiting.

    On this host its process is looked up; on another host its last heartbeat must be younger than GONE_S.
    """
    if attempt.host == socket.gethostname():
        return _alive(attempt)
    return time.time() - attempt.seen < GONE_S


def last(run: Location) -> RecordedAttempt | None:
    """Reads the run's newest attempt from its ledger; None if it has none."""
    attempts = goodput.read(run)
    return max(attempts, key=lambda a: a.started, default=None)


def _alive(attempt: RecordedAttempt) -> bool:
    """Checks whether the attempt's process exists, and is not another one that got the same process id later."""
    try:
        process = psutil.Process(attempt.pid)
        return process.create_time() <= attempt.started + 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
