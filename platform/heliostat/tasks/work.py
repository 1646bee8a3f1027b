"""Keeps what unfinished work has done: spill files, and a record of every finished task under the key of what it follows from.

    spill/3f/3f2a...-9810.parquet    what tasks hand to later tasks, named after its content and size
    done/read/9c01....json      the record of a finished task, written last, by the task itself
    notes/read-9c01....json     what a task that is run again is about to do (`care`)
    work.json                   marks the folder; the size of the pieces that the input is cut into, which stays as it grows

A key is the SHA-256 of the task's inputs, configuration and the version of this code. So a run that was killed finds the records
of all that was finished; a changed threshold has other keys from there on; new input has keys of its own. A record whose files
are missing, or of another size, counts for nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import libraries, spill

log = logging.getLogger(__name__)

CODE = 9  # raised when the same inputs and configuration give other spill files
READERS = 32  # threads
DONE, SPILL, NOTES, MARK = "done", "spill", "notes", "work.json"
SIZES = 16  # times, by which an input may grow before its pieces become larger


def key(*parts: object) -> str:
    """Computes the key of a task: 32 hex digits of the SHA-256 of JSON values, and of the code's version."""
    return hashlib.sha256(json.dumps([CODE, *parts], sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Work:
    """Locates the work folder of a pipeline, and keeps its records."""

    location: Location

    @property
    def spill(self) -> Location:
        return self.location.join(SPILL)

    def note(self, kind: str, key: str) -> Location:
        """Locates what a task that is run again notes."""
        return self.location.join(NOTES, f"{kind}-{key}.json")

    def finish(self, kind: str, key: str, record: Mapping[str, object]) -> None:
        """Records a finished task, whose files have been written."""
        self.location.join(DONE, kind, f"{key}.json").write(json.dumps(record).encode())

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Maps every file of the folder, as it was when the run began, to its bytes."""
        return dict(self.location.files())

    def found(self, kind: str, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Reads the records of those tasks that an earlier run has finished and whose files are there."""
        recorded = [k for k in keys if f"{DONE}/{kind}/{k}.json" in self._sizes]
        with ThreadPoolExecutor(READERS) as pool:
            records = dict(zip(recorded, pool.map(lambda k: self._whole(kind, k), recorded), strict=True))
        return {k: record for k, record in records.items() if record is not None}

    def read(self, kind: str, key: str) -> dict[str, Any] | None:
        """Reads the record of a task; None if there is none that can be read."""
        try:
            record = json.loads(self.location.join(DONE, kind, f"{key}.json").read())
        except (FileNotFoundError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def _whole(self, kind: str, key: str) -> dict[str, Any] | None:
        record = self.read(kind, key)
        whole = record is not None and all(self._sizes.get(f"{SPILL}/{n}") == spill.size_of(n) for n in record.get("files", []))
        return record if whole else None

    def made_with(self, versions: dict[str, str]) -> None:
        """Records with which versions of libraries the work is done; logs what an earlier run had other versions of."""
        place = self.location.join(NOTES, "libraries.json")
        try:
            before = json.loads(place.read())
        except (FileNotFoundError, ValueError):
            before = {}
        if difference := libraries.changed(before, versions):
            log.warning("work: %s: doing the work that depends on these libraries again", ", ".join(difference))
        if before != before | versions:
            place.write(json.dumps(before | versions).encode())

    def begin(self, piece: int) -> int:
        """Claims the folder and returns the size of pieces: an earlier run's, unless that differs from `piece` by SIZES times.

        ConfigError if other things lie there.
        """
        try:
            known = json.loads(self.location.join(MARK).read())["piece"]
        except FileNotFoundError:
            if self._sizes:
                fault = "is not empty, and isn't unfinished work. Name another folder"
                raise ConfigError(f"work: {self.location}: {fault}") from None
            known = 0
        except (ValueError, TypeError, KeyError):
            known = 0
        if isinstance(known, int) and known * SIZES > piece and piece * SIZES > known:
            return known
        self.location.join(MARK).write(json.dumps({"piece": piece}).encode())
        return piece

    def clear(self) -> None:
        """Deletes the work, and the folder if nothing else is in it."""
        if not self.location.join(MARK).exists():
            return
        for name in (DONE, SPILL, NOTES, MARK):  # the mark last: what breaks off is done again
            self.location.join(name).delete()
        if not self.location.is_s3:
            with contextlib.suppress(OSError):
                Path(self.location.path).rmdir()
