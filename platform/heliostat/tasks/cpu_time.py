"""Measures the CPU time of a worker, including the processes that run parsers for it (`isolated`).

Stages and tasks are measured in CPU time, so that predictions are the same on a busy machine and on an idle machine.
"""

from __future__ import annotations

import time

_elsewhere = 0.0


def add(seconds: float) -> None:
    """Adds CPU seconds that another process spent for this process."""
    global _elsewhere
    _elsewhere += seconds


def now() -> float:
    """Returns the CPU seconds so far: of all threads, and of the processes that were counted with `add`."""
    return time.process_time() + _elsewhere
