"""Keeps a job's log in storage: `logs/ATTEMPT.NNNNNN.log` in the run's folder, parts of one MiB.

Objects in storage cannot be appended to; in parts, storing what is new costs no more than one part, however long the log is.
"""

from __future__ import annotations

import os
import tempfile
import threading

from heliostat import run_folder
from heliostat.storage import Location

PART = 1 << 20


class LogCopy:
    """Copies an attempt's log to storage; `add` and `send` may be called in different threads."""

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
        """Writes the parts that storage lacks, or has only in part."""
        with self._one:
            while self._sent < self._written:
                number = self._sent // PART
                data = os.pread(self._file.fileno(), PART, number * PART)
                self.folder.join(f"{self.attempt}.{number:06d}.log").write(data)
                self._sent = number * PART + len(data)


def stored(run: Location) -> str | None:
    """Reads the logs of every submission of a run, concatenated; None if there are none."""
    names = sorted(n for n, _ in run.join(run_folder.LOGS).files() if n.endswith(".log"))
    return b"".join(run.join("logs", n).read() for n in names).decode(errors="replace") if names else None
