"""Keeps what is known of a task that has failed: how often, what it noted, and which documents it leaves out.

A task that has failed is run again with `Care`: it notes in the work folder what it is about to do, a batch at a time. If its
process dies, the next run takes the documents of the noted batch one by one, and notes each. A document at which the process dies
twice is left out (`crashed`). `curation.careful` takes the documents.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

from heliostat.errors import HeliostatError
from heliostat.storage.locations import Location
from heliostat.text import brief

CRASHED = "crashed"
MEANING = "it ended its process, or a stage raised an error at it, each time"
UNREAD = "unread"
UNREAD_MEANING = "the rest of a file, or of a range of it: reading fails there each time; how many documents it holds isn't known"
MOST, SHARE = 20, 1000  # crashed documents: a run ends at more than MOST, and more than one in SHARE
BLAMED = 2  # times that a process must die at a document


def most(documents: int) -> int:
    """Returns how many of so many documents may crash."""
    return max(MOST, documents // SHARE)


def too_many(crashed: int, what: str) -> HeliostatError:
    """Makes the error of a run in which too many documents crash."""
    return HeliostatError(
        f"stages: {crashed:,} documents crashed, more than {MOST} and than one in {SHARE:,}: {what}. Correct the "
        "stage or the input, and start again. Finished tasks are kept"
    )


def last_line(error: BaseException) -> str:
    """Returns an error's kind and the last line of what it says."""
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines()
    return brief(f"{type(cause).__name__}: {lines[-1].strip()}" if lines else type(cause).__name__)


@dataclass(frozen=True)
class TaskPlace:
    """Describes what a task was about to do: read the next of a `part`, or take documents through stages (`part` -1)."""

    number: int
    """How many had been read, or taken, before."""
    part: int = -1
    alone: bool = False
    """Whether it was one document, and not a batch."""
    id: str = ""
    stage: str = ""


@dataclass(frozen=True)
class Crash:
    """Describes a document that is left out: its place, the stage at which the task failed, and the error's last line."""

    number: int
    part: int
    id: str
    stage: str
    detail: str


@dataclass(frozen=True)
class Care:
    """Tells a task how it is run again: where it notes what it does, what is taken one by one, and what is left out."""

    note: Location
    attempt: int
    suspect: TaskPlace | None = None
    crashed: tuple[Crash, ...] = ()


@dataclass
class Trouble:
    """Knows of a task how often it has failed since a document was found at which it does, and which documents it leaves out."""

    count: int = 0
    attempt: int = 0
    suspect: TaskPlace | None = None
    blamed: Counter[TaskPlace] = field(default_factory=Counter)
    crashed: list[Crash] = field(default_factory=list)

    def care(self, note: Location) -> Care:
        """Returns how the task is run next."""
        self.attempt += 1
        return Care(note, self.attempt, self.suspect, tuple(self.crashed))

    def learn(self, note: Location, error: BaseException) -> Crash | None:
        """Learns from what a process that died had noted; returns the document that is left out from now on, if it was found."""
        if (place := _noted(note, self.attempt)) is None:
            return None
        if not place.alone:
            self.suspect = place
            return None
        self.blamed[place] += 1
        if self.blamed[place] != BLAMED:
            return None
        crash = Crash(place.number, place.part, place.id, place.stage, last_line(error))
        self.crashed.append(crash)
        self.count = 0
        return crash


def _noted(note: Location, attempt: int) -> TaskPlace | None:
    try:
        note_read = json.loads(note.read())
        return TaskPlace(**note_read["place"]) if note_read["attempt"] == attempt else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
