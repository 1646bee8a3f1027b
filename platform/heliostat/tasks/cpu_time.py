"""Measures the CPU time of a worker, including the processes that run parsers for it (`isolated`).

Stages and tasks are measured in CPU time, so that predictions from a busy machine equal those from an idle one.
"""

from __future__ import annotations

import time

_elsewhere = 0.0


def add(seconds: float) -> None:
    """Adds CPU seconds that another process spent for this one."""
    global _elsewhere
    _elsewhere += seconds


def now() -> float:
    """Returns the CPU seconds so far, of all threads and of the processes that `add` has counted."""
    return time.process_time() + _elsewhere
