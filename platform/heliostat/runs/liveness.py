"""Whether a run's driver lives: every driver's ledger says each few seconds that it does, on which host and as which process.

That there is one at a time is the lease's business (`lease`).
"""

from __future__ import annotations

import socket
import time

import psutil

from heliostat.runs import goodput
from heliostat.runs.goodput import Attempt
from heliostat.storage import Location

GONE_S = 120.0  # after which a driver on another host is taken for dead, by its clock, which may be behind


def lives(attempt: Attempt) -> bool:
    """Whether the driver of an attempt without an outcome is there, as far as can be told at once."""
    if attempt.host == socket.gethostname():
        return _alive(attempt)
    return time.time() - attempt.seen < GONE_S


def last(run: Location) -> Attempt | None:
    """The run's newest attempt."""
    attempts = goodput.read(run)
    return max(attempts, key=lambda a: a.started, default=None)


def _alive(attempt: Attempt) -> bool:
    """Whether the attempt's process is there, and not another one that was given its number."""
    try:
        process = psutil.Process(attempt.pid)
        return process.create_time() <= attempt.started + 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
