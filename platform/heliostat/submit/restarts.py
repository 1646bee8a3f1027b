"""Whether a training command that has ended is to be started again: its driver died, and there is a budget.

A command that ends by itself says so in the run's ledger, whatever its exit code; one that is killed (out of memory, a fault in a
library) does not. Its successor goes on from the newest checkpoint. The budget is the job's `retries`: so many deaths in a row,
where progress begins a new row.
"""

from __future__ import annotations

import json
import logging
import signal
import socket
import time

from heliostat import run_folder
from heliostat.config.spec import Retries
from heliostat.errors import HeliostatError, TrainingError
from heliostat.runs import goodput
from heliostat.runs.goodput import Attempt
from heliostat.storage import Location
from heliostat.train.driver.recovery import Budget

log = logging.getLogger(__name__)


class Again:
    """Of one run, or one sweep, in `folder`."""

    def __init__(self, folder: Location, retries: Retries, sweep: bool = False) -> None:
        self.folder, self.sweep = folder, sweep
        self.budget = Budget(retries)
        self._began = time.time()

    def died(self, pid: int, code: int) -> str:
        """How the command died, of this exit code as `Popen` tells it; empty if it ended by itself."""
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        mine = None if self.sweep or not code else self._attempt(pid)
        return f"with exit code {code}" if mine is not None and mine.outcome is None else ""

    def wait_s(self, how: str) -> float:
        """Seconds until it is to be started again; TrainingError if its budget is used up."""
        return self.budget.spend(TrainingError(f"the driver died without a word, {how}"), self._progress())

    def flags(self, given: list[str], pid: int) -> list[str]:
        """The successor's: it goes on with what the dead one has begun, but does not take an earlier run for that."""
        if not self._has_begun(pid):
            return given
        return [*(f for f in given if f not in ("--overwrite", "--resume")), "--resume"]

    def _attempt(self, pid: int) -> Attempt | None:
        """The newest of this process in the run's ledger."""
        try:
            found = [a for a in goodput.read(self.folder) if (a.host, a.pid) == (socket.gethostname(), pid)]
        except (HeliostatError, OSError) as e:
            log.warning("how the driver ended is not known: %s", e)
            return None
        return max(found, key=lambda a: a.started, default=None)

    def _has_begun(self, pid: int) -> bool:
        if not self.sweep:
            return self._attempt(pid) is not None
        try:
            return json.loads(self.folder.join("sweep.json").read())["created"] >= self._began
        except (HeliostatError, OSError, ValueError, KeyError):
            return False

    def _progress(self) -> int:
        """The newest checkpoint's step, or the number of trials that are over."""
        try:
            if self.sweep:
                from heliostat.tune import listing

                return listing.progress(self.folder)[0]
            names = [name for name, _ in self.folder.join(run_folder.CHECKPOINTS).files() if name.endswith("/checkpoint.json")]
        except (HeliostatError, OSError) as e:
            log.warning("how far the run is, is not known: %s", e)
            return -1
        return max((int(n.removeprefix("step-").partition("/")[0]) for n in names if n.startswith("step-")), default=0)
