"""Tracks the failures of a task, and finds the documents that crash its process.

A task that has failed runs again with `Care`. Before each batch of documents, the task writes a note to the work folder. If the
task's process dies, the next run of the task processes the documents of the noted batch one by one, and writes a note before each
document. A document at which the process dies twice is left out (`crashed`). `curation.careful` processes the documents.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from heliostat.errors import HeliostatError
from heliostat.storage.locations import Location
from heliostat.text import brief

CRASHED = "crashed"
MEANING = "it ended its process, or a stage raised an error at it, each time"
UNREAD = "unread"
UNREAD_MEANING = "the rest of a file, or of a range of it: reading fails there each time; how many documents it holds isn't known"
MOST, SHARE = 20, 1000  # a run fails if more than MOST documents crash, and more than one in SHARE
BLAMED = 2  # deaths of the process at a document, after which the task leaves the document out


def most(documents: int) -> int:
    """Returns the maximum number of documents that may crash, out of `documents` documents."""
    return max(MOST, documents // SHARE)


def too_many(crashed: int, what: str) -> HeliostatError:
    """Builds the error for a run in which too many documents crashed. `what`: an example of these documents."""
    return HeliostatError(
        f"stages: {crashed:,} documents crashed, more than {MOST} and more than one in {SHARE:,}: {what}. Correct the "
        "stage or the input, and run the command again. Finished tasks are kept"
    )


def last_line(error: BaseException) -> str:
    """Returns an error's class name and the last line of its message."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return brief(f"{type(cause).__name__}: {lines[-1].strip()}" if lines else type(cause).__name__)


@dataclass(frozen=True)
class TaskPlace:
    """Describes a task's next action: to read the next documents of a `part`, or to pass documents through stages (`part` -1)."""

    number: int
    """Number of documents that the task read, or passed through stages, before this action."""
    part: int = -1
    alone: bool = False
    """Whether the action is for one document, not for a batch."""
    id: str = ""
    stage: str = ""


@dataclass(frozen=True)
class Crash:
    """Describes a document that is left out: its position, the stage at which the task failed, and the error's last line."""

    number: int
    part: int
    id: str
    stage: str
    detail: str


@dataclass(frozen=True)
class Care:
    """Holds the instructions for a task that runs again: the file for its notes, the batch to process one by one, and the
    documents to leave out."""

    note: Location
    attempt: int
    suspect: TaskPlace | None = None
    crashed: tuple[Crash, ...] = ()


@dataclass(slots=True)
class Trouble:
    """Counts a task's failures since the task last left a document out, and lists the documents that the task leaves out. Each
    task under way has such an object, so it's small until the task fails."""

    count: int = 0
    attempt: int = 0
    suspect: TaskPlace | None = None
    blamed: tuple[TaskPlace, ...] = ()
    crashed: tuple[Crash, ...] = ()

    def care(self, note: Location) -> Care:
        """Returns the instructions for the task's next run, and counts the attempt."""
        self.attempt += 1
        return Care(note, self.attempt, self.suspect, self.crashed)

    def learn(self, note: Location, error: BaseException) -> Crash | None:
        """Reads the note that the task's process wrote before the process died.

        Returns the document to leave out from now on; None if the note doesn't identify this document yet.
        """
        if (place := _noted(note, self.attempt)) is None:
            return None
        if not place.alone:
            self.suspect = place
            return None
        self.blamed += (place,)
        if self.blamed.count(place) != BLAMED:
            return None
        crash = Crash(place.number, place.part, place.id, place.stage, last_line(error))
        self.crashed += (crash,)
        self.count = 0
        return crash


def _noted(note: Location, attempt: int) -> TaskPlace | None:
    try:
        note_read = json.loads(note.read())
        return TaskPlace(**note_read["place"]) if note_read["attempt"] == attempt else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
