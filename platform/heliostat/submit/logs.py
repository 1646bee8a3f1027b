"""Copies a job's log to storage in parts of one MiB: `logs/ATTEMPT.NNNNNN.log` in the run's folder.

Storage can't append to an object. So the log is stored in parts, and an update rewrites only the last part, however long the log
is.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from typing import IO

from heliostat.storage import run_folder
from heliostat.storage.locations import Location

log = logging.getLogger(__name__)

PART = 1 << 20


class LogCopy:
    """Copies an attempt's log to storage. `add` and `send` may be called in different threads.

    If the disk is full, a note in the copy replaces the text that didn't fit.
    """

    def __init__(self, folder: Location, attempt: str) -> None:
        self.folder, self.attempt = folder, attempt
        self._file: IO[bytes] | None = None
        self._missing, self._why = 0, ""
        self._written = self._sent = 0
        self._one = threading.Lock()

    def add(self, data: bytes) -> None:
        """Appends bytes to the log; never raises an OSError."""
        note = f"\n[{self._missing:,} bytes of the log are missing: {self._why}]\n".encode() if self._missing else b""
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="heliostat-", suffix=".log", buffering=0)  # noqa: SIM115 (for good)
            self._append(self._file.fileno(), note + data)
        except OSError as e:
            if not self._missing:
                log.warning("the copy of the job's log is missing later lines: %s", e)
            self._missing, self._why = self._missing + len(data), e.strerror or str(e)
        else:
            self._missing = 0

    def _append(self, file: int, data: bytes) -> None:
        """Appends all of the data. If an error occurs, no part of the data counts as written."""
        end, rest = self._written, memoryview(data)
        while rest:
            count = os.pwrite(file, rest, end)
            end, rest = end + count, rest[count:]
        self._written = end

    def send(self) -> None:
        """Writes log parts to storage: the parts that storage lacks, and the parts that are incomplete there."""
        with self._one:
            while self._file and self._sent < self._written:
                number = self._sent // PART
                data = os.pread(self._file.fileno(), min(PART, self._written - number * PART), number * PART)
                self.folder.join(f"{self.attempt}.{number:06d}.log").write(data)
                self._sent = number * PART + len(data)


def stored(run: Location) -> str | None:
    """Reads and joins the logs of all submissions of a run; None if there are no logs."""
    names = sorted(n for n, _ in run.join(run_folder.LOGS).files() if n.endswith(".log"))
    return b"".join(run.join("logs", n).read() for n in names).decode(errors="replace") if names else None
