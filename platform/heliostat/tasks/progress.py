"""Reports a pipeline's progress: tasks of each kind (done and total), documents, MB/s, and the remaining time of the current
kind."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from heliostat.terminal import duration

Clock = Callable[[], float]
Show = Callable[[str, str], None]  # takes the kind of tasks, and the line


@dataclass
class KindProgress:
    """Counts the tasks of one kind. `kept`: tasks that an earlier run has finished; `done`: tasks that this run has finished."""

    began: float
    total: int = 0
    done: int = 0
    kept: int = 0
    documents: int = 0
    bytes: int = 0
    """Bytes that the tasks of this run have read."""
    left_bytes: int = 0
    """Bytes that the remaining tasks will read."""
    whole: bool = False
    """Whether `total` already counts all tasks. heliostat counts tasks while it looks up their records."""

    def left(self, now: float) -> float | None:
        """Estimates the seconds until the last task ends. Uses the tasks' bytes if they are known, else the numbers of tasks.
        Returns None if no estimate is possible."""
        if not self.done or not self.whole:
            return None
        share = self.left_bytes / self.bytes if self.bytes else (self.total - self.kept - self.done) / self.done
        return share * (now - self.began)


def silent(kind: str, line: str) -> None:
    """Ignores a progress line. This function is the default for `Progress.show`."""


@dataclass
class Progress:
    """Counts tasks when heliostat looks up their records and when they finish. Shows a line each time."""

    show: Show = silent
    clock: Clock = time.monotonic
    kinds: dict[str, KindProgress] = field(default_factory=dict)

    def found(self, kind: str, kept: list[dict[str, Any]], todo: list[int], whole: bool) -> None:
        """Counts tasks of a kind, after heliostat has looked up their records.

        `kept`: records of tasks that an earlier run has finished; `todo`: bytes that each of the other tasks will read.
        """
        at = self.kinds.setdefault(kind, KindProgress(self.clock()))
        at.total += len(kept) + len(todo)
        at.kept += len(kept)
        at.documents += sum(map(documents, kept))
        at.left_bytes += sum(todo)
        at.whole = whole
        self._show(kind, at)

    def done(self, kind: str, record: dict[str, Any], bytes: int) -> None:
        """Counts a finished task that has read `bytes` bytes."""
        at = self.kinds[kind]
        at.done += 1
        at.documents += documents(record)
        at.bytes += bytes
        at.left_bytes -= bytes
        self._show(kind, at)

    def _show(self, kind: str, at: KindProgress) -> None:
        if at.total and self.show is not silent:
            self.show(kind, line(kind, at, self.clock()))


def documents(record: Mapping[str, Any]) -> int:
    """Returns the number of documents in a task's record: documents that the task passed on, wrote to shards, or answered."""
    shards = sum(s["documents"] for s in record.get("shards", []))
    passed = record.get("passed", 0)  # to the next part of a stream, without a temporary file
    return sum(rows for _, rows, _ in record.get("runs", [])) + shards + record.get("answers", 0) + passed


def line(kind: str, at: KindProgress, now: float) -> str:
    """Formats the progress of one kind of tasks, for example `read 12/40 tasks  10,000 documents  31.5 MB/s  ETA 2 min 10 s`."""
    seconds, left = now - at.began, at.left(now)
    parts = [
        f"{kind} {at.kept + at.done:,}/{at.total:,}{'' if at.whole else '+'} tasks",
        f"{at.documents:,} documents" if at.documents else "",
        f"{at.bytes / seconds / 1e6:,.1f} MB/s" if at.bytes and seconds > 0 else "",
        f"ETA {duration(left)}" if left else "",
        f"{at.kept:,} of them done before" if at.kept else "",
    ]
    return "  ".join(part for part in parts if part)
