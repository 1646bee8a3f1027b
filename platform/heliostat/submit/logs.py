"""A job's log as storage keeps it: `logs/ATTEMPT.NNNNNN.log` in the run's folder, parts of a megabyte.

An object cannot be added to; so what is new costs no more than its part to keep, however long the log is.
"""

from __future__ import annotations

import os
import tempfile
import threading

from heliostat import run_folder
from heliostat.storage import Location

PART = 1 << 20


class LogCopy:
    """`add` and `send` may be called in different threads."""

    def __init__(self, folder: Location, attempt: str) -> None:
        self.folder, self.attempt = folder, attempt
        self._file = tempfile.TemporaryFile(prefix="heliostat-", suffix=".log")  # noqa: SIM115 (as long as the process)
        self._written = self._sent = 0
        self._one = threading.Lock()

    def add(self, data: bytes) -> None:
        self._file.write(data)
        self._file.flush()
        self._written += len(data)

    def send(self) -> None:
        """Writes the parts that storage does not have yet, or not all of."""
        with self._one:
            while self._sent < self._written:
                number = self._sent // PART
                data = os.pread(self._file.fileno(), PART, number * PART)
                self.folder.join(f"{self.attempt}.{number:06d}.log").write(data)
                self._sent = number * PART + len(data)


def stored(run: Location) -> str | None:
    """The logs of every submission of a run, one behind the other; None if there are none."""
    names = sorted(n for n, _ in run.join(run_folder.LOGS).files() if n.endswith(".log"))
    return b"".join(run.join("logs", n).read() for n in names).decode(errors="replace") if names else None
