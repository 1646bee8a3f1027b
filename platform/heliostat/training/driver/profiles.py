"""Passes requests for a profile (`runs.profile`) on from the run's folder to the workers, in a thread: a store may be slow."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from heliostat.errors import DataError, HeliostatError
from heliostat.runs import profile
from heliostat.runs.profile import ProfileRequest
from heliostat.storage.locations import Location

log = logging.getLogger(__name__)

EVERY_S = 5.0


class ProfileRequests:
    """Looks for requests every EVERY_S from `begin` to `end`, and gives each once to `order`."""

    def __init__(self, run: Location, workers: int, order: Callable[[ProfileRequest], None]) -> None:
        self._run, self._workers, self._order = run, workers, order
        self._last = ""  # id of the last request
        self._ended = threading.Event()

    def begin(self) -> None:
        """Starts the thread."""
        threading.Thread(target=self._watch, name="profiles", daemon=True).start()

    def end(self) -> None:
        """Ends the thread, without waiting for a store that doesn't answer."""
        self._ended.set()

    def look(self) -> None:
        """Passes on a new request. One for a worker that the run doesn't have gets its answer here."""
        try:
            request = profile.requested(self._run)
        except DataError as e:
            log.warning("%s; the request is deleted", e)
            profile.discard(self._run)
            return
        if request is None or request.id == self._last:
            return
        if request.rank < self._workers:
            self._order(request)
        else:
            profile.answer(self._run, request, problem=f"the run has {self._workers} workers now")
        self._last = request.id

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            try:
                self.look()
            except (HeliostatError, OSError) as e:
                log.warning("no request for a profile could be read: %s", e)
