"""Retries actions that fail temporarily, within a budget in seconds. Each wait is twice as long as the previous wait.

`diagnose` decides from an error of the store or the operating system whether another attempt can help.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from heliostat.errors import ConfigError
from heliostat.text import brief

T = TypeVar("T")
BUDGET = "HELIOSTAT_RETRY_BUDGET_S"  # environment variable: seconds for which a failing store is retried
# answers of stores, in lower case without punctuation: ACCESS_DENIED, AccessDenied and "Access Denied" are the same
REFUSED = ("accessdenied", "allaccessdisabled", "expiredtoken", "httpstatus401", "httpstatus403", "invalidaccesskeyid",
           "invalidtoken", "requesttimetooskewed", "signaturedoesnotmatch", "unrecognizedclient")  # fmt: skip
MISSING = ("nosuchkey", "resourcenotfound")
DAMAGED_ON_THE_WAY = ("baddigest", "incompletebody", "invalidpart")  # an upload damaged in transit: another attempt can help
NO_BUCKET = "NO_SUCH_BUCKET"  # as the S3 client writes it
HOPELESS = ("nosuchbucket", "httpstatus301", "httpstatus400", "httpstatus405", "httpstatus501")
FINAL = {
    "refused": "access denied. Check the credentials and the bucket policy",
    "hopeless": "the store can't do this. Check the bucket, credentials, region, and endpoint",
}


@dataclass(frozen=True)
class Backoff:
    """Describes the waits between attempts, in seconds. Each wait is twice the previous one, from `first` to `longest`."""

    first: float
    longest: float
    jitter: float = 0.0  # fraction by which waits vary at random, so that clients that fail together don't retry together

    @property
    def shortest(self) -> float:
        """Computes the shortest possible wait between two attempts, in seconds."""
        return self.first * (1 - self.jitter)

    def wait(self, failures: int) -> float:
        """Computes the seconds to wait after `failures` consecutive failures (1 or more)."""
        usual = min(self.longest, self.first * 2 ** min(failures - 1, 64))
        return usual * random.uniform(1 - self.jitter, 1 + self.jitter)


@dataclass(frozen=True)
class FailedAttempts:
    """Describes the failed attempts so far, for the decision whether to try again."""

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
    """Runs an action until it succeeds. The action must be repeatable from its start.

    - `judge` raises for an error that another attempt can't fix.
    - `give_up` raises once the budget, in seconds, is used up.
    - `report` gets each failure and the wait after it. `sleep` waits instead of `time.sleep`.

    An attempt begins only if it would end within the budget, assuming that it takes as long as the last attempt. The last wait is
    shortened, so that the complete budget is used.
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
    """Reads the retry budget for a failing store, in seconds, from the environment. Raises ConfigError for an invalid number."""
    raw = os.environ.get(BUDGET, "60")
    try:
        budget_s = float(raw)
    except ValueError:
        budget_s = -1.0
    if not 0 <= budget_s < float("inf"):
        raise ConfigError(f"{BUDGET}: {raw!r} isn't a number of seconds. Set it to 60, or unset it")
    return budget_s


@contextmanager
def limited(budget_s: float) -> Iterator[None]:
    """Changes the retry budget of this process to `budget_s` seconds for a block of code. Afterwards, the budget is what it was,
    because other code of this process may follow."""
    before = os.environ.get(BUDGET)
    os.environ[BUDGET] = str(budget_s)
    try:
        yield
    finally:
        if before is None:
            del os.environ[BUDGET]
        else:
            os.environ[BUDGET] = before


def patience(budget_s: float) -> tuple[int, float]:
    """Splits the retry budget into a number of attempts per request, and the seconds of silence that each attempt may have.

    All attempts of a request together take less than half the budget.

    The SDK repeats single requests, so that one fault doesn't undo a large upload. The SDK pauses up to 1 s, then up to 2 s.
    `Location.attempt` repeats complete operations.
    """
    return (3 if budget_s >= 24 else 2 if budget_s >= 6 else 1), max(1.0, budget_s / 8)


def diagnose(error: OSError) -> str:
    """Classifies an error: `refused`, `missing`, `hopeless`, `fault` (of the store, so a retry can help) or `content`.

    pyarrow has one class for all these errors. Errors of its S3 client contain AWS or S3, and errors of the operating system
    have a number. An OSError with neither of these comes from a Parquet or codec library, and is caused by the file's content.
    """
    _, mark, answer = str(error).rpartition("AWS Error")  # the text before it contains names of key and bucket
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
    """Returns the first line of an error, or the name of its class if the error has no message."""
    return brief(error) or type(error).__name__
