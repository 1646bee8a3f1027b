"""Waits, in tests, for other processes and threads."""

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
    """Returns the condition's result once it is true; fails, with the given message, after the timeout, or when `alive` returns
    False."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert alive(), f"ended before {what}: {said()[-3000:]}"
        assert time.monotonic() < deadline, f"no {what} in {seconds:g} s: {said()[-3000:]}"
        time.sleep(0.05)
    return value
