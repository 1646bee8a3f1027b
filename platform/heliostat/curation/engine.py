"""Runs an input's documents through the stages, on Ray. The input is pieces of files, and the result is temporary files of the
kept documents.

The result is a pure function of inputs and configuration. A task's output doesn't depend on where, when, or how often it runs.
Comparisons of documents (`GlobalStage`) don't depend on the distribution of documents across temporary files. Every finished task
is recorded (`work`), so the pipeline's next run doesn't repeat this task.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, TypeVar

from heliostat.curation import recording, segment, tally
from heliostat.curation.chain import Entry
from heliostat.curation.pieces import FilePart
from heliostat.curation.segment import EXAMPLES, DocumentSource, SpilledRun
from heliostat.curation.stage import GlobalStage, Stage
from heliostat.storage.locations import Location
from heliostat.tasks import libraries, shipping
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.pool import TaskFunction
from heliostat.tasks.work import key

RUN_SHARE = 8  # a run's texts take 1 / RUN_SHARE of `memory_limit`: memory has them as strings, a table, and a file
TALLIES = 64  # tallies that a task sums
Item = TypeVar("Item")


class TakenFiles(NamedTuple):
    """Lists the files that a task has written: dropped documents, counts per stage ("" for none), and kept documents."""

    left_out: tuple[str, ...]
    tally: str
    runs: tuple[SpilledRun, ...]


@dataclass
class Curated:
    """Holds the output of the stages: the names of temporary files with kept documents, dropped documents, and counts per
    stage."""

    runs: list[SpilledRun] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    tallies: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    source: DocumentSource | None = None
    """Converts documents to their stored form after a stage between segments has shortened these documents. `identity`:
    everything that this conversion depends on."""
    identity: list[object] = field(default_factory=list)
    every: int = 1
    """Which dropped documents are recorded (`recording`)."""

    @property
    def bytes(self) -> int:
        return sum(run.bytes for run in self.runs)

    def take(self, record: dict[str, Any]) -> TakenFiles:
        """Adds a task's counts to this object. Returns the names of the task's files."""
        self.reasons.update(record["reasons"])
        for reason, ids in record["examples"].items():
            self.examples[reason] = heapq.nsmallest(EXAMPLES, [*self.examples.get(reason, []), *ids])
        runs = tuple(SpilledRun(name, rows, bytes) for name, rows, bytes in record["runs"])
        return TakenFiles(tuple(record["left_out"]), record.get("tally", ""), runs)

    def keep(self, files: Iterable[TakenFiles]) -> list[SpilledRun]:
        """Adds the files of dropped documents and of tallies, in this order. Returns the temporary files of kept documents."""
        runs = list[SpilledRun]()
        for taken in files:
            self.left_out += taken.left_out
            self.tallies += [taken.tally] if taken.tally else []
            runs += taken.runs
        return runs


@dataclass
class StageEngine:
    """Runs stages as Ray tasks of a `Flow`; `memory_limit`: the bytes of memory that a task may use."""

    flow: Flow
    source: DocumentSource
    identity: list[object]
    memory_limit: int
    every: int = 1

    def curate(self, pieces: Iterable[list[FilePart]], stages: list[Stage], explained: bool = True) -> Curated:
        """Runs the documents in pieces of the input through all stages, the largest pieces first. With `explained`, also counts
        the documents that are read."""
        first, *rest = segments(stages)
        curated = Curated(source=self.source, identity=self.identity, every=self.every)
        parts = list(pieces)
        order = sorted(range(len(parts)), key=lambda number: -sum(part.length for part in parts[number]))
        tasks = self._over_pieces(self._begun((parts[number] for number in order), stages), [s for _, s in first], explained)
        curated.runs = self._taken(curated, "read", segment.over_pieces, tasks, order=order)
        for part in rest:
            number, head = part[0]
            if isinstance(head, GlobalStage):
                curated.runs = head.compare(self.flow, curated, number, self.memory_limit)
            else:
                chain = [s for _, s in part]
                curated.runs = self._taken(
                    curated, f"stages-{number}", segment.over_run, self._over_runs(curated.runs, chain, number), pooled=head.gpu
                )
        return curated

    def _taken(
        self,
        curated: Curated,
        kind: str,
        function: TaskFunction,
        tasks: Iterator[Task],
        pooled: bool = False,
        order: Sequence[int] | None = None,
    ) -> list[SpilledRun]:
        """Runs the tasks of a segment (consecutive stages). Returns the tasks' temporary files of kept documents. `order`: for
        each task, its place in the result; by default, the tasks' order. Keeps only the names of a task's files, because an
        input may have millions of tasks."""
        taken = {number: curated.take(record) for number, record in self.flow.run(kind, function, tasks, pooled=pooled)}
        numbers = sorted(taken, key=lambda number: order[number]) if order else sorted(taken)
        return curated.keep(taken[number] for number in numbers)

    def _begun(self, pieces: Iterable[list[FilePart]], stages: list[Stage]) -> Iterator[list[FilePart]]:
        """Yields the pieces. Records the libraries' versions only at the first piece, because this run owns the work folder by
        then."""
        used = {name for stage in stages for name in stage.libraries}
        for number, piece in enumerate(pieces):
            if not number:
                self.flow.work.made_with(libraries.versions([*libraries.READING, *used]))
            yield piece

    def _over_pieces(self, pieces: Iterable[list[FilePart]], stages: list[Stage], explained: bool) -> Iterator[Task]:
        follows, read = [s.follows() for s in stages], libraries.versions(libraries.READING)
        entries, more = list[Entry](), recording.arguments(self.every)
        for piece in pieces:
            entries = entries or self._entries(stages)
            follows_from, before = (
                key("read", self.identity, read, follows, self.run_bytes, explained, identities, *more.items())
                for identities in ([part.identity for part in piece], [part.identity_by_time for part in piece])
            )
            yield Task(follows_from, {"piece": piece, "source": self.source, "stages": entries, "run_bytes": self.run_bytes,
                                      "explained": explained, **more}, {}, sum(part.length for part in piece), careful=True,
                       before=before)  # fmt: skip

    def _over_runs(self, runs: list[SpilledRun], stages: list[Stage], number: int) -> Iterator[Task]:
        follows = [s.follows() for s in stages]
        entries, more = self._entries(stages), recording.arguments(self.every)
        for run in runs:
            follows_from = key("stages", self.identity, number, follows, self.run_bytes, run.name, run.decided, *more.items())
            yield Task(follows_from, {"run": run, "source": self.source, "stages": entries, "first": number,
                                      "run_bytes": self.run_bytes, **more}, bytes=run.bytes, careful=True)  # fmt: skip

    def _entries(self, stages: list[Stage]) -> list[Entry]:
        """Returns for each stage: its entry in the pipeline file, the digest of its dependencies, and the files that the entry
        lists. The stage's tasks get these values as arguments."""
        entries = list[Entry]()
        for stage in stages:
            shipments = (shipping.describe(name, path) for name, path in stage.named_paths())
            entries.append((stage.entry(), key(stage.follows()), tuple(shipments)))
        return entries

    @property
    def run_bytes(self) -> int:
        return self.memory_limit // RUN_SHARE


def segments(stages: list[Stage]) -> list[list[tuple[int, Stage]]]:
    """Splits a list of stages, with their numbers, into segments. A stage that compares documents or needs a GPU is a segment of
    its own.

    The first segment never has a stage of these kinds, so the first segment may be empty.
    """
    groups = [list[tuple[int, Stage]]()]
    for number, stage in enumerate(stages):
        if _alone(stage) or any(_alone(s) for _, s in groups[-1]):
            groups.append([])
        groups[-1].append((number, stage))
    return groups


def _alone(stage: Stage) -> bool:
    return stage.gpu or isinstance(stage, GlobalStage)


def summed(flow: Flow, names: list[str]) -> tally.Tally:
    """Sums the counts (tallies) in some temporary files. If there are more than TALLIES files, Ray tasks sum parts of them
    first."""
    while len(names) > TALLIES:
        tasks = (Task(key("tally", part), {"names": part}) for part in groups(names, TALLIES))
        names = [record["tally"] for record in flow.all("tally", _sum, tasks)]
    return tally.merge(segment.load(flow.work.spill, name) for name in names)


def _sum(folder: Location, names: list[str]) -> dict[str, object]:
    name = segment.store(folder, tally.merge(segment.load(folder, n) for n in names))
    return {"tally": name, "files": [name]}


def groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yields the items in groups of equal size; the last group may be smaller."""
    left = iter(items)
    while group := list(islice(left, size)):
        yield group


def filled(items: Iterable[Item], size: Callable[[Item], int], room: int, most: int = 1 << 60) -> Iterator[list[Item]]:
    """Yields the items in groups. A group has at most `most` items, and a total size of at most `room`; an item larger than
    `room` is a group of its own."""
    waiting, taken = list[Item](), 0
    for item in items:
        if waiting and (taken + size(item) > room or len(waiting) == most):
            yield waiting
            waiting, taken = [], 0
        waiting.append(item)
        taken += size(item)
    if waiting:
        yield waiting
