"""Waits for a store that doesn't answer."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NoReturn

from heliostat.errors import AccessError, StorageError
from heliostat.storage import retries
from heliostat.storage.locations import Location
from heliostat.storage.retries import Backoff, FailedAttempts

log = logging.getLogger(__name__)

AWAY_S = 1800.0  # seconds to wait for an unreachable store, because its error would end running work
PATIENT = Backoff(1.0, 60.0, jitter=0.2)


def wait_for_store(location: Location, sleep: Callable[[float], object] | None = None) -> None:
    """Waits until the location's store answers. Raises StorageError after AWAY_S seconds. An AccessError is raised at once.

    Use this function for running work, such as a resumed run, because it costs more to end the work than to wait.
    """

    def judge(error: Exception) -> None:
        if isinstance(error, AccessError) or not isinstance(error, StorageError):
            raise error

    def give_up(failure: FailedAttempts) -> NoReturn:
        raise StorageError(
            f"{failure.error}. Waited {failure.seconds:.0f} s for the store. Try again when the store answers"
        ) from failure.error

    def tell(failure: FailedAttempts, wait: float) -> None:
        left = f"Waiting for the store, up to {max(0.0, AWAY_S - failure.seconds):.0f} s more"
        log.warning("%s. %s, next attempt in %.0f s", failure.error, left, wait)

    retries.retry(location.probe, AWAY_S, PATIENT, judge, give_up, tell, sleep)
