"""Retries what fails for a while: within a budget of seconds, each wait twice as long as the one before.

`diagnose` tells from an error of the store or of the operating system whether another attempt is worth it.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from heliostat.errors import ConfigError
from heliostat.text import brief

T = TypeVar("T")
BUDGET = "HELIOSTAT_RETRY_BUDGET_S"  # of a store that fails
# what stores answer, in lower case without punctuation: ACCESS_DENIED, AccessDenied and "Access Denied" are one
REFUSED = ("accessdenied", "allaccessdisabled", "expiredtoken", "httpstatus401", "httpstatus403", "invalidaccesskeyid",
           "invalidtoken", "requesttimetooskewed", "signaturedoesnotmatch", "unrecognizedclient")  # fmt: skip
MISSING = ("nosuchkey", "resourcenotfound")
DAMAGED_ON_THE_WAY = ("baddigest", "incompletebody", "invalidpart")  # an upload's, so worth another
NO_BUCKET = "NO_SUCH_BUCKET"  # in the words of the S3 client
HOPELESS = ("nosuchbucket", "httpstatus301", "httpstatus400", "httpstatus405", "httpstatus501")
FINAL = {
    "refused": "access denied. Check the credentials and the bucket policy",
    "hopeless": "the store can't do this. Check the bucket, credentials, region, and endpoint",
}


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
    report: Callable[[FailedAttempts, float], None] = lambda failure, wait: None,
    sleep: Callable[[float], object] | None = None,
) -> T:
    """Runs an action until it succeeds; it must be one that may be repeated from its start.

    `judge` raises for an error that another attempt would not help, and `give_up` once the budget is used up; `report` hears of
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
        report(failure, wait)
        (sleep or time.sleep)(wait)


def retry_budget() -> float:
    """Reads from the environment for how many seconds a failing store is retried; ConfigError for what is no such number."""
    raw = os.environ.get(BUDGET, "60")
    try:
        budget_s = float(raw)
    except ValueError:
        budget_s = -1.0
    if not 0 <= budget_s < float("inf"):
        raise ConfigError(f"{BUDGET}: {raw!r} isn't a number of seconds. Set it to 60, or unset it")
    return budget_s


def patience(budget_s: float) -> tuple[int, float]:
    """Splits the retry budget into attempts at one request, and the seconds of silence that each may last: all of them take less
    than half the budget.

    The SDK repeats single requests, so that one fault does not undo a large upload (it pauses up to 1 s, then up to 2 s);
    `Location.attempt` repeats whole operations.
    """
    return (3 if budget_s >= 24 else 2 if budget_s >= 6 else 1), max(1.0, budget_s / 8)


def diagnose(error: OSError) -> str:
    """Classifies an error: `refused`, `missing`, `hopeless`, `fault` (of the store, so worth a retry) or `content`.

    pyarrow has one class for all of them. Whatever its S3 client reports names AWS or S3, whatever the operating system reports
    has a number; an OSError without either is a Parquet or codec library's, about the bytes.
    """
    _, mark, answer = str(error).rpartition("AWS Error")  # before it stand the names of key and bucket
    words = re.sub(r"[^a-z0-9]", "", answer.lower())
    if isinstance(error, FileNotFoundError) or any(word in words for word in MISSING):
        return "missing"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS or any(word in words for word in REFUSED):
        return "refused"
    if not any(word in words for word in DAMAGED_ON_THE_WAY) and any(word in words for word in HOPELESS):
        return "hopeless"
    known = mark or "S3 bucket" in answer or error.errno is not None or isinstance(error, (TimeoutError, ConnectionError))
    return "fault" if known else "content"


def reason(error: Exception) -> str:
    """Returns the error's first line, or its kind if it has none."""
    return brief(error) or type(error).__name__
