"""Retries what fails for a while: within a budget of seconds, each wait twice as long as the one before."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from heliostat.errors import ConfigError

T = TypeVar("T")
BUDGET = "HELIOSTAT_RETRY_BUDGET_S"  # of a store that fails


@dataclass(frozen=True)
class Backoff:
    """Describes the waits between attempts, in seconds."""

    first: float
    longest: float
    jitter: float = 0.0  # by what share waits vary at random, so that many that fail together do not come again together

    @property
    def shortest(self) -> float:
        """Computes the shortest wait that there is."""
        return self.first * (1 - self.jitter)

    def wait(self, failures: int) -> float:
        """Computes the wait behind so many failures in a row, from 1 on."""
        usual = min(self.longest, self.first * 2 ** min(failures - 1, 64))
        return usual * random.uniform(1 - self.jitter, 1 + self.jitter)


@dataclass(frozen=True)
class FailedAttempts:
    """Describes what has failed so far, when another attempt is decided on."""

    error: Exception
    count: int
    seconds: float  # since the first attempt began


def retry(
    action: Callable[[], T],
    budget_s: float,
    backoff: Backoff,
    judge: Callable[[Exception], None],
    give_up: Callable[[FailedAttempts], NoReturn],
    tell: Callable[[FailedAttempts, float], None] = lambda failure, wait: None,
    sleep: Callable[[float], object] | None = None,
) -> T:
    """Runs an action until it succeeds; it must be one that may be repeated from its start.

    `judge` raises for an error that another attempt would not help, and `give_up` once the budget is used up; `tell` hears of
    each wait, and `sleep` waits, if it is given. No attempt begins that would end beyond the budget if it took as long as the
    last; the last wait is cut, so that the budget is used up to its end.
    """
    start, count = time.monotonic(), 0
    while True:
        begun = time.monotonic()
        try:
            return action()
        except Exception as e:  # noqa: BLE001 (judged)
            now = time.monotonic()
            judge(e)
            count += 1
            failure, left = FailedAttempts(e, count, now - start), start + budget_s - now - (now - begun)
            if left < backoff.shortest:
                give_up(failure)
            wait = min(backoff.wait(count), left)
        tell(failure, wait)
        (sleep or time.sleep)(wait)


def retry_budget() -> float:
    """Reads from the environment for how many seconds a failing store is retried; ConfigError for what is no such number."""
    raw = os.environ.get(BUDGET, "60")
    try:
        budget_s = float(raw)
    except ValueError:
        budget_s = -1.0
    if not 0 <= budget_s < float("inf"):
        raise ConfigError(f"{BUDGET}: {raw!r} is no number of seconds; set it to 60, or unset it")
    return budget_s


def patience(budget_s: float) -> tuple[int, float]:
    """Splits the retry budget into attempts at one request, and the seconds of silence that each may last: all of them take less
    than half the budget.

    The SDK repeats single requests, so that one fault does not undo a large upload (it pauses up to 1 s, then up to 2 s);
    `Location.attempt` repeats whole operations.
    """
    return (3 if budget_s >= 24 else 2 if budget_s >= 6 else 1), max(1.0, budget_s / 8)
