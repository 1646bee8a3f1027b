"""Starts or joins Ray: reports a failure in one line, and tries once more where a busy machine was too slow."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import psutil
import ray

from heliostat.cluster import processes
from heliostat.errors import ClusterError
from heliostat.text import brief

log = logging.getLogger(__name__)
TRIES = 2
END_S = 5.0


def init(**options: Any) -> None:
    """Calls `ray.init`, again if it fails once; ClusterError if it fails twice.

    Ray gives its processes 30 s to start, and a busy machine may need more.
    """
    for left in reversed(range(TRIES)):
        before = _children()
        try:
            ray.init(**options)
        except BaseException as e:
            _end(before)
            if not isinstance(e, Exception):
                raise
            if not left:
                raise ClusterError(f"Ray did not start, {TRIES} times: {brief(e)}; is the machine too busy, or full?") from e
            log.warning("Ray did not start (%s); trying once more", brief(e))
        else:
            return


def _children() -> set[psutil.Process]:
    return set(processes.descendants(os.getpid()))


def _end(before: set[psutil.Process]) -> None:
    """Ends the processes that a failed start has left."""
    with contextlib.suppress(Exception):  # it may have got anywhere
        ray.shutdown()
    processes.stop(_children() - before, END_S)
