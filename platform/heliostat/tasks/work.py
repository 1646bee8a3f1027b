"""Keeps the results of unfinished work: spill files, and a record of each finished task under the task's key.

    spill/3f/3f2a...-9810.parquet   results for later tasks, named after content and size
    done/read/9c01....json          the record of a finished task, which the task writes last
    notes/read-9c01....json         the next action of a task that runs again (`care`)
    work.json                       marks the folder; has the size of the input's pieces, which stays the same as the input grows

A key is the SHA-256 of the task's inputs, its configuration, and the version of this code. So after a kill, the next run finds
the records of all finished tasks. If a threshold changes, the tasks of its stage and of later stages have new keys. Tasks for new
input have new keys too. A record is ignored if one of its files is missing or has another size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from heliostat.errors import ConfigError
from heliostat.storage.locations import Location
from heliostat.tasks import libraries, spill

log = logging.getLogger(__name__)

CODE = 9  # increased if the same inputs and configuration give other spill files
READERS = 32  # threads
DONE, SPILL, NOTES, MARK = "done", "spill", "notes", "work.json"
SIZES = 16  # factor by which the input may grow before its pieces become larger


def key(*parts: object) -> str:
    """Computes the key of a task: 32 hex digits of the SHA-256 of JSON values and of the code's version."""
    return hashlib.sha256(json.dumps([CODE, *parts], sort_keys=True).encode()).hexdigest()[:32]


def keys(*parts: object) -> Callable[..., str]:
    """Returns a function that computes `key(*parts, *more)` from `more`. The digest of `parts` is computed once, for many keys
    with the same large parts."""
    begun = hashlib.sha256(json.dumps([CODE, *parts], sort_keys=True)[:-1].encode())

    def finished(*more: object) -> str:
        digest = begun.copy()
        digest.update(f", {json.dumps(more, sort_keys=True)[1:]}".encode())
        return digest.hexdigest()[:32]

    return finished


def _is_own(path: str) -> bool:
    """Checks whether a path in a work folder has the form of a temporary file, a record, or a note."""
    folder, _, name = path.partition("/")
    if folder == SPILL:
        return spill.size_of(name) is not None
    return folder == NOTES or (folder == DONE and re.fullmatch(r"[^/]+/[0-9a-f]{32}\.json", name) is not None)


@dataclass(frozen=True)
class Work:
    """Reads and writes the records in a pipeline's work folder.

    `marked`: whether the folder had its mark when the tasks began. If the mark is missing later, the run has ended, and has
    removed the folder.
    """

    location: Location
    marked: bool = False

    @property
    def spill(self) -> Location:
        return self.location.join(SPILL)

    def note(self, kind: str, key: str) -> Location:
        """Returns the location of the note that a task writes when it runs again (`care`)."""
        return self.location.join(NOTES, f"{kind}-{key}.json")

    def finish(self, kind: str, key: str, record: Mapping[str, object]) -> None:
        """Writes the record of a finished task. The task's files must already be complete."""
        self.location.join(DONE, kind, f"{key}.json").write(json.dumps(record).encode())

    def of_tasks(self) -> Work:
        """Returns the folder for tasks: without the cached list of files, and with `marked` as it is now."""
        return Work(self.location, self.location.join(MARK).exists())

    @property
    def is_removed(self) -> bool:
        """Checks whether the run has removed this folder."""
        return self.marked and not self.location.join(MARK).exists()

    def remove(self, names: Iterable[str]) -> None:
        """Deletes temporary files."""
        for name in names:
            self.spill.join(name).delete()

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Maps every file that was in the work folder when the run began to the file's size in bytes."""
        return dict(self.location.files())

    def found(self, kind: str, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """Reads the records of the tasks in `keys` that an earlier run has finished. Returns key -> record, for tasks whose
        temporary files exist."""
        recorded = [k for k in keys if f"{DONE}/{kind}/{k}.json" in self._sizes]
        with ThreadPoolExecutor(READERS) as pool:
            records = dict(zip(recorded, pool.map(lambda k: self._whole(kind, k), recorded), strict=True))
        return {k: record for k, record in records.items() if record is not None}

    def read(self, kind: str, key: str) -> dict[str, Any] | None:
        """Reads the record of a task; None if the record is missing or unreadable."""
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
        """Records the versions of the libraries that this work uses. Logs a warning if an earlier run used other versions."""
        place = self.location.join(NOTES, "libraries.json")
        try:
            before = json.loads(place.read())
        except (FileNotFoundError, ValueError):
            before = {}
        if difference := libraries.changed(before, versions):
            log.warning(
                "work: %s: the versions differ, so heliostat repeats the work that depends on these libraries",
                ", ".join(difference),
            )
        if before != before | versions:
            place.write(json.dumps(before | versions).encode())

    def begin(self, piece: int) -> int:
        """Claims the folder and returns the size of pieces: an earlier run's size, or `piece` if the two sizes differ by a factor
        of SIZES or more.

        Raises ConfigError if the folder holds other files.
        """
        try:
            known = json.loads(self.location.join(MARK).read())["piece"]
        except FileNotFoundError:
            if not all(map(_is_own, self._sizes)):  # a task that outlived its run may have written files after the mark's end
                fault = "isn't empty, and isn't a work folder of heliostat. Set work to another folder"
                raise ConfigError(f"work: {self.location}: {fault}") from None
            known = 0
        except (ValueError, TypeError, KeyError):
            known = 0
        if isinstance(known, int) and known * SIZES > piece and piece * SIZES > known:
            return known
        self.location.join(MARK).write(json.dumps({"piece": piece}).encode())
        return piece

    def clear(self) -> None:
        """Deletes the unfinished work, and the work folder if it has no other files."""
        if not self.location.join(MARK).exists():
            return
        for name in (DONE, SPILL, NOTES, MARK):  # the mark last, so that an interrupted deletion can be repeated
            self.location.join(name).delete()
        if not self.location.is_s3:
            with contextlib.suppress(OSError):
                Path(self.location.path).rmdir()
