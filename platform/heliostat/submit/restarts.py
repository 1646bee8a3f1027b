"""Decides whether a training command that has ended is started again: its driver died, and retries are left.

A command that ends by itself records that in the run's ledger, whatever its exit code; one that is killed (out of memory, a fault
in a library) does not. Its successor continues from the newest checkpoint. The budget is the job's `retries`: the maximum number
of deaths in a row, where progress resets the count. A store that is away is waited for: what the dead command has begun is read
there. A successor that fails before it has begun, such as on a store that went away again, counts as one more death.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import time
from collections.abc import Callable

from heliostat.config.spec import Retries
from heliostat.errors import HeliostatError, TrainingError
from heliostat.runs import goodput
from heliostat.runs.goodput import RecordedAttempt
from heliostat.storage import run_folder
from heliostat.storage.locations import Location
from heliostat.training.driver.recovery import Budget

log = logging.getLogger(__name__)


class Again:
    """Decides on restarts of the command of one run, or one sweep, in `folder`."""

    def __init__(
        self, folder: Location, retries: Retries, sweep: bool = False, pause: Callable[[float], object] | None = None
    ) -> None:
        """Prepares decisions; `pause` waits so many seconds, and raises a HeliostatError if the command is not to go on."""
        self.folder, self.sweep, self._pause = folder, sweep, pause
        self.budget = Budget(retries)
        self._began = time.time()

    def died(self, pid: int, code: int) -> str:
        """Describes how the command died, from its exit code as `Popen` returns it; empty if it ended by itself."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        if self.sweep or not code:
            return ""
        try:
            mine = self._attempt(pid)
        except (HeliostatError, OSError) as e:
            log.warning("how the driver ended is not known: %s", e)
            return ""
        if mine is None:  # it had not begun
            return f"with exit code {code} before it had begun" if self.budget.used and code == 1 else ""
        return f"with exit code {code}" if mine.outcome is None else ""

    def wait_s(self, how: str) -> float:
        """Returns the seconds to wait before the restart; TrainingError if the retries are used up."""
        return self.budget.spend(TrainingError(f"the driver died without a word, {how}"), self._progress())

    def flags(self, given: list[str], pid: int) -> list[str]:
        """Returns the successor's flags: it resumes what the dead command has begun, but never an earlier run.

        Raises a HeliostatError if it cannot be read whether the command has begun.
        """
        if not self._has_begun(pid):
            return given
        return [*(f for f in given if f not in ("--overwrite", "--resume")), "--resume"]

    def _attempt(self, pid: int) -> RecordedAttempt | None:
        """Finds this process's newest attempt in the run's ledger; None if there is none."""
        self.folder.wait_for_store(self._pause)
        mine = [a for a in goodput.read(self.folder) if (a.host, a.pid) == (socket.gethostname(), pid)]
        return max(mine, key=lambda a: a.started, default=None)

    def _has_begun(self, pid: int) -> bool:
        if not self.sweep:
            return self._attempt(pid) is not None
        self.folder.wait_for_store(self._pause)
        try:
            return json.loads(self.folder.join("sweep.json").read())["created"] >= self._began
        except (FileNotFoundError, ValueError, KeyError):
            return False

    def _progress(self) -> int:
        """Returns the newest checkpoint's step, or the number of finished trials of a sweep; -1 if that is not known."""
        try:
            if self.sweep:
                from heliostat.tune import listing

                return listing.progress(self.folder)[0]
            names = [name for name, _ in self.folder.join(run_folder.CHECKPOINTS).files() if name.endswith("/checkpoint.json")]
        except (HeliostatError, OSError) as e:
            log.warning("how far the run is, is not known: %s", e)
            return -1
        return max((int(n.removeprefix("step-").partition("/")[0]) for n in names if n.startswith("step-")), default=0)
