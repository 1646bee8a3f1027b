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


def alone(run: Location) -> None:
    """ConfigError if another command is training the run; waits some seconds where only time can tell."""
    last = _last(run)
    if last is None or last.outcome is not None:
        return
    if last.host == socket.gethostname():
        if not _alive(last):
            return
    else:
        deadline, seen = time.time() + SILENCE_S, last.seen
        while time.time() < deadline and last is not None and last.seen == seen:
            time.sleep(1.0)
            last = _last(run)
        if last is None or last.seen == seen:
            return
    raise ConfigError(
        f"name: {run} is being trained by process {last.pid} on {last.host}; wait for it, stop it, or use another name"
    )


def _last(run: Location) -> Attempt | None:
    """The run's newest attempt."""
    attempts = goodput.read(run)
    return max(attempts, key=lambda a: a.started, default=None)


def _alive(attempt: Attempt) -> bool:
    """Whether the attempt's process is there, and not another one that was given its number."""
    try:
        return psutil.Process(attempt.pid).create_time() <= attempt.started + 1 and attempt.pid != psutil.Process().pid
    except psutil.NoSuchProcess:
        return False
