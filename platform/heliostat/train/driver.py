"""One driver at a time: two commands that train the same run would take each other's checkpoints for their own.

Every driver's ledger says each few seconds that it lives, on which host and as which process.
"""

from __future__ import annotations

import socket
import time

import psutil

from heliostat import goodput
from heliostat.errors import ConfigError
from heliostat.goodput import Attempt
from heliostat.storage import Location
from heliostat.train.ledger import EVERY_S

SILENCE_S = 3 * EVERY_S  # after which a driver on another host is taken for dead
GONE_S = 120.0  # the same by its clock, which may be behind


def alone(run: Location) -> None:
    """ConfigError if another command is training the run; waits some seconds where only time can tell."""
    newest = last(run)
    if newest is None or newest.outcome is not None:
        return
    if newest.host == socket.gethostname():
        if newest.pid == psutil.Process().pid or not _alive(newest):
            return
    else:
        deadline, seen = time.time() + SILENCE_S, newest.seen
        while time.time() < deadline and newest is not None and newest.seen == seen:
            time.sleep(1.0)
            newest = last(run)
        if newest is None or newest.seen == seen:
            return
    raise ConfigError(
        f"name: {run} is being trained by process {newest.pid} on {newest.host}; wait for it, stop it, or use another name"
    )


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
        return psutil.Process(attempt.pid).create_time() <= attempt.started + 1
    except psutil.NoSuchProcess:
        return False
