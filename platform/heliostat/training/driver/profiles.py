"""Forwards requests for a profile (`runs.profile`) from the run's folder to the workers. Uses a thread, because a store may be
slow."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from heliostat.errors import DataError, HeliostatError
from heliostat.runs import profile
from heliostat.runs.profile import ProfileRequest
from heliostat.storage.locations import Location
from heliostat.text import brief

log = logging.getLogger(__name__)

EVERY_S = 5.0
STACKS_S = 30.0  # seconds for py-spy to read the stacks of the driver's threads


class ProfileRequests:
    """Checks for requests every EVERY_S seconds from `begin` to `end`, and passes each request to `order` once."""

    def __init__(self, run: Location, workers: int, order: Callable[[ProfileRequest], None]) -> None:
        self._run, self._workers, self._order = run, workers, order
        self._last = ""  # id of the last request
        self._ended = threading.Event()

    def begin(self) -> None:
        """Starts the thread."""
        threading.Thread(target=self._watch, name="profiles", daemon=True).start()

    def end(self) -> None:
        """Ends the thread without waiting for a store that doesn't answer."""
        self._ended.set()

    def look(self) -> None:
        """Forwards a new request. Answers a request for a rank that the run doesn't have."""
        try:
            request = profile.requested(self._run)
        except DataError as e:
            log.warning("%s. Deleting the request", e)
            profile.discard(self._run)
            return
        if request is None or request.id == self._last or self._ended.is_set():
            return
        if request.rank < self._workers:
            self._keep_stacks(request)  # first: the worker's answer lists the file
            self._order(request)
        else:
            profile.answer(self._run, request, problem=f"the run has {self._workers} workers now")
        self._last = request.id

    def _keep_stacks(self, request: ProfileRequest) -> None:
        """Adds the stacks of this process's threads to a profile. If this fails, logs the reason in one line."""
        try:
            profile.place(self._run, request).join(profile.DRIVER).write(_stacks())
        except (HeliostatError, OSError) as e:
            log.warning("the profile has no stacks of the driver: %s", e)

    def _watch(self) -> None:
        while not self._ended.wait(EVERY_S):
            try:
                self.look()
            except (HeliostatError, OSError) as e:
                log.warning("can't read requests for a profile: %s", e)


def _stacks() -> bytes:
    """Reads the stacks of this process's threads with py-spy, without stopping them. Raises HeliostatError if py-spy fails."""
    program = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if program is None:
        raise HeliostatError("py-spy isn't installed where the driver runs. Run: pip install py-spy")
    try:
        command = [program, "dump", "--nonblocking", "--pid", str(os.getpid())]
        done = subprocess.run(command, capture_output=True, timeout=STACKS_S, check=False)
    except subprocess.TimeoutExpired as e:
        raise HeliostatError(f"py-spy didn't finish within {STACKS_S:.0f} s") from e
    if done.returncode:
        raise HeliostatError(f"py-spy failed ({brief(done.stderr.decode(errors='replace'))})")
    return done.stdout
