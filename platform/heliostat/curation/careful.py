"""Processes a task's documents so that one bad document doesn't end the pipeline's run (`tasks.care`).

If a stage raises an error, the documents of the batch are processed one by one. If reading a file part fails, the rest of this
part is left out (`unread`).
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field

from heliostat.curation import tally
from heliostat.curation.pieces import FilePart
from heliostat.curation.stage import Document, Dropped
from heliostat.errors import HeliostatError
from heliostat.tasks.care import CRASHED, UNREAD, Care, Crash, TaskPlace, last_line, most, too_many
from heliostat.text import printable

READ, INPUT = "read", "the input"  # the name of the stage; the name of an input that is a single file
READ_TOGETHER = 64  # documents that are read between two recorded steps


@dataclass
class Careful:
    """Processes a task's documents. `care` is None if an error should end the task. `crashes` counts the documents that are left
    out, because processing them failed."""

    care: Care | None
    taken: int = 0
    """Documents that were processed so far."""
    read: int = 0
    """Documents that were read so far, including those that reading leaves out."""
    part: int = 0
    crashes: int = 0
    unread: list[str] = field(default_factory=list)
    """File parts in which reading failed, each with its error. The documents after the failure are missing."""

    def reading(
        self, piece: list[FilePart], read: Callable[[FilePart], Iterable[Document | Dropped]]
    ) -> Iterator[Document | Dropped]:
        """Yields the documents of file parts. If reading a part fails, and `care` isn't None, yields the documents before the
        failure, then a `Dropped` for the rest of the part."""
        for self.part, part in enumerate(piece):
            yield from read(part) if self.care is None else self._part(self.care, part, read)

    def _part(
        self, care: Care, part: FilePart, read: Callable[[FilePart], Iterable[Document | Dropped]]
    ) -> Iterator[Document | Dropped]:
        lost = {crash.number: crash.detail for crash in care.crashed if crash.part == self.part}
        items, last, row = iter(read(part)), "", 0
        item: Document | Dropped
        while True:
            why = lost.get(self.read)
            if why is None:
                self._note_reading(care, part)
                try:
                    if (taken := next(items, None)) is None:
                        return
                    item = taken
                except (HeliostatError, OSError):  # errors of the store
                    raise
                except Exception as e:  # noqa: BLE001 - any error of a reader is the part's fault, and is recorded with it
                    why = last_line(e)
            if why is not None:
                reason = f"{_range(part)} after row {_row(last, row)} could not be read: {why}"
                self.unread.append(reason)
                item, items = Dropped(part.path or INPUT, UNREAD, reason), iter(())
                self._crashed(Crash(self.read, self.part, item.id, READ, why))
            assert item is not None
            self.read, last, row = self.read + 1, item.id, row + 1
            yield item

    def _note_reading(self, care: Care, part: FilePart) -> None:
        suspect, at = care.suspect, self.read
        if suspect is not None and suspect.part >= 0 and suspect.number <= at < suspect.number + READ_TOGETHER:
            self.note(TaskPlace(at, self.part, True, part.path or INPUT, READ))
        elif at % READ_TOGETHER == 0:
            self.note(TaskPlace(at, 0))

    def note(self, place: TaskPlace) -> None:
        """Records the next step in the task's note. If the process crashes, heliostat then knows at which step."""
        if self.care is not None:
            note = {"attempt": self.care.attempt, "place": asdict(place)}
            self.care.note.write(json.dumps(note).encode())

    def take(self, batch: list[Document], through: Through) -> None:
        """Runs a batch of documents through the stages, and leaves out the documents at which a stage fails."""
        first, self.taken = self.taken, self.taken + len(batch)
        if self.care is None:
            through.batch(batch)
            return
        if not self._together(self.care, first, batch, through):
            self._one_by_one(self.care, first, batch, through)
        self.note(TaskPlace(self.read - self.read % READ_TOGETHER, 0))

    def _together(self, care: Care, first: int, batch: list[Document], through: Through) -> bool:
        lost = any(crash.part < 0 and first <= crash.number < self.taken for crash in care.crashed)
        if lost or care.suspect == TaskPlace(first):
            return False
        self.note(TaskPlace(first))
        try:
            through.batch(batch)
        except HeliostatError:
            raise
        except Exception:  # noqa: BLE001 - raised again when a document is alone
            return False
        return True

    def _one_by_one(self, care: Care, first: int, batch: list[Document], through: Through) -> None:
        lost = {crash.number: crash for crash in care.crashed if crash.part < 0}
        for number, document in enumerate(batch, first):
            crash = lost.get(number)
            stage = ""

            def about(name: str, number: int = number, document: Document = document) -> None:
                nonlocal stage
                stage = name
                self.note(TaskPlace(number, -1, True, document.id, name))

            if crash is None:
                try:
                    through.batch([document], about)
                except HeliostatError:
                    raise
                except Exception as e:  # noqa: BLE001 - any error of a stage is the document's fault, and is recorded with it
                    crash = Crash(number, -1, document.id, stage, last_line(e))
            if crash is not None:
                through.leave_out(document, crash)
                self._crashed(crash)

    def _crashed(self, crash: Crash) -> None:
        self.crashes += 1
        if self.crashes > most(max(self.read, self.taken)):
            raise too_many(self.crashes, f"for example {printable(crash.id)!r} at {printable(crash.stage)} ({crash.detail})")


def _range(part: FilePart) -> str:
    """Formats a part of the input: a file, or a range of a file."""
    path = printable(part.path or INPUT)
    return path if part.stop is None else f"bytes {part.start:,} to {part.stop:,} of {path}"


def _row(last: str, count: int) -> str:
    """Returns the number of the last row that was read: the number in the row's id or, if the id has no number, the count."""
    number = last.rpartition("#")[2]
    return number if number.isdecimal() else str(count)


class Through(ABC):
    """Defines how a task runs documents through the stages: a complete batch, or nothing of it if a stage fails. Each kind of
    task implements this class."""

    @abstractmethod
    def batch(self, documents: list[Document], about: Callable[[str], None] = lambda stage: None) -> None:
        """Runs a batch through the stages. Calls `about` with a stage's name before the stage runs."""

    @abstractmethod
    def leave_out(self, document: Document, crash: Crash) -> None:
        """Records that a document was left out, because a stage failed at this document."""


def count(counts: tally.Tally, stages: list[str], crash: Crash, size: int) -> None:
    """Counts a document that crashed at one of the `stages`, or after all of them. In the stages before the crash, the document
    counts as kept."""
    for name in stages:
        entry = tally.entry(counts, name)
        entry["documents"] += 1
        entry["bytes"] += size
        if name == crash.stage:
            break
        entry["kept"] += 1
        entry["kept_bytes"] += size
    dropped = tally.entry(counts, crash.stage)["dropped"]
    dropped[CRASHED] = dropped.get(CRASHED, 0) + 1
