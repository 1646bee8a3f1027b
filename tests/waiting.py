"""Waits, in tests, for what other processes and threads do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(
    condition: Callable[[], T],
    what: str,
    seconds: float = 120,
    alive: Callable[[], bool] = lambda: True,
    said: Callable[[], str] = str,
) -> T:
    """Returns what the condition returns once that is true; fails, with what was said, after so long, or once `alive` is not."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert alive(), f"ended before {what}: {said()[-3000:]}"
        assert time.monotonic() < deadline, f"no {what} in {seconds:g} s: {said()[-3000:]}"
        time.sleep(0.05)
    return value
