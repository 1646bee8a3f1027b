"""Retries what fails for a while: within a budget of seconds, each wait twice as long as the one before."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

T = TypeVar("T")


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
class Failure:
    """Describes what has failed so far, when another attempt is decided on."""

    error: Exception
    count: int
    seconds: float  # since the first attempt began


def retry(
    action: Callable[[], T],
    budget_s: float,
    backoff: Backoff,
    judge: Callable[[Exception], None],
    give_up: Callable[[Failure], NoReturn],
    tell: Callable[[Failure, float], None] = lambda failure, wait: None,
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
            failure, left = Failure(e, count, now - start), start + budget_s - now - (now - begun)
            if left < backoff.shortest:
                give_up(failure)
            wait = min(backoff.wait(count), left)
        tell(failure, wait)
        (sleep or time.sleep)(wait)
