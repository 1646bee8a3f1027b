"""Counts the processor time of a worker, with that of the processes in which it has parsers run (`isolated`).

What stages and tasks take is measured in this time, so that a busy machine predicts the same hours as an idle one.
"""

from __future__ import annotations

import time

_elsewhere = 0.0


def add(seconds: float) -> None:
    """Counts seconds that another process took for this one."""
    global _elsewhere
    _elsewhere += seconds


def now() -> float:
    """Returns the seconds of processor time so far; all threads count."""
    return time.process_time() + _elsewhere
