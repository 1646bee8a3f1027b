"""Checks whether a run's driver is alive, by the heartbeat in the run's ledger. Every few seconds, the driver writes a heartbeat
with its host and its process.

The lease (`lease`) ensures that at most one driver is alive at a time.
"""

from __future__ import annotations

import socket
import time

import psutil

from heliostat.runs import goodput
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage.locations import Location

GONE_S = 120.0  # if the heartbeat is older, a driver on another host counts as dead; that host's clock may be slow


def lives(attempt: RecordedAttempt) -> bool:
    """Checks whether the driver of an attempt is alive; the attempt has no outcome yet. Doesn't wait for a new heartbeat.

    For a driver on this host, looks up the driver's process. For a driver on another host, the last heartbeat must be younger
    than GONE_S.
    """
    if attempt.host == socket.gethostname():
        return _alive(attempt)
    return time.time() - attempt.seen < GONE_S


def last(run: Location) -> RecordedAttempt | None:
    """Reads the newest attempt of a run from its ledger; None if there is no attempt."""
    attempts = goodput.read(run)
    return max(attempts, key=lambda a: a.started, default=None)


def _alive(attempt: RecordedAttempt) -> bool:
    """Checks whether the attempt's process still exists. A later process with the same process id doesn't count."""
    try:
        process = psutil.Process(attempt.pid)
        return process.create_time() <= attempt.started + 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
