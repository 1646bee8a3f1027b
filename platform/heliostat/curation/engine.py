"""Runs an input's documents through the stages, on Ray. The input is pieces of files, and the result is temporary files of the
kept documents.

The result is a pure function of inputs and configuration. A task's output doesn't depend on where, when, or how often it runs.
Comparisons of documents (`GlobalStage`) don't depend on the distribution of documents across temporary files. Every finished task
is recorded (`work`), so the pipeline's next run doesn't repeat this task.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, TypeVar

from heliostat.curation import gpus, recording, segment, tally
from heliostat.curation.chain import Entry
from heliostat.curation.pieces import FilePart, revision
from heliostat.curation.segment import EXAMPLES, DocumentSource, SpilledRun
from heliostat.curation.stage import GlobalStage, Stage
from heliostat.curation.streamed import StreamPart, StreamPlan
from heliostat.storage.locations import Location
from heliostat.tasks import libraries, shipping
from heliostat.tasks.clusters import CountedTasks
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.names import SpilledNames
from heliostat.tasks.pool import TaskFunction
from heliostat.tasks.work import key

RUN_SHARE = 8  # a run's texts take 1 / RUN_SHARE of `memory_limit`: memory has them as strings, a table, and a file
TALLIES = 64  # tallies that a task sums
Item = TypeVar("Item")
Numbered = list[tuple[int, Stage]]
"""A segment: its stages, with their numbers in the pipeline."""


@dataclass
class Curated:
    """Holds the output of the stages: the names of temporary files with kept documents, dropped documents, and counts per
    stage."""

    runs: list[SpilledRun] = field(default_factory=list)
    left_out: SpilledNames = field(default_factory=SpilledNames)
    tallies: SpilledNames = field(default_factory=SpilledNames)
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

    def take(self, record: dict[str, Any]) -> tuple[SpilledRun, ...]:
        """Adds a task's counts, and the names of its other temporary files. Returns the temporary files of kept documents."""
        self.reasons.update(record["reasons"])
        for reason, ids in record["examples"].items():
            self.examples[reason] = heapq.nsmallest(EXAMPLES, [*self.examples.get(reason, []), *ids])
        self.left_out.extend(record["left_out"])
        self.tallies.extend([name] if (name := record.get("tally")) else [])
        return tuple(SpilledRun(name, rows, bytes) for name, rows, bytes in record["runs"])


@dataclass
class StageEngine:
    """Runs stages as recorded tasks of a `Flow`, or in a stream if they need GPUs (`streaming`). `memory_limit`: the bytes of
    memory that a task may use; `can_repeat`: whether two copies of a reading task may run at the same time; `warm`: whether
    reading tasks first run some documents without a result, for a sample."""

    flow: Flow
    source: DocumentSource
    identity: list[object]
    memory_limit: int
    every: int = 1
    can_repeat: bool = True
    warm: bool = False

    def curate(self, pieces: Iterable[list[FilePart]], stages: list[Stage], explained: bool = True) -> Curated:
        """Runs the documents in pieces of the input through all stages. With `explained`, also counts the documents that are
        read. Empties `pieces` if it is a list, so that memory has only the pieces that no task has."""
        curated, parts = Curated(source=self.source, identity=self.identity, every=self.every), segments(stages)
        for compares, group in groupby(parts, _compares):
            some = list(group)
            if compares:
                for ((number, stage),) in some:
                    assert isinstance(stage, GlobalStage)
                    curated.runs = stage.compare(self.flow, curated, number, self.memory_limit)
            elif some[0] is parts[0]:
                count, left = (len(pieces), _emptied(pieces)) if isinstance(pieces, list) else (None, pieces)
                tasks = self._over_pieces(self._begun(left, stages), [s for _, s in some[0]], explained)
                tasks = CountedTasks(tasks, count) if count is not None else tasks
                curated.runs = self._through(curated, some, ["read", *kinds(some[1:])], tasks, explained)
            else:
                tasks = self._over_runs(curated.runs, [s for _, s in some[0]], some[0][0][0])
                curated.runs = self._through(curated, some, kinds(some), tasks)
        return curated

    def _through(
        self, curated: Curated, parts: list[Numbered], names: list[str], tasks: Iterator[Task], explained: bool = False
    ) -> list[SpilledRun]:
        """Runs consecutive segments that don't compare documents, in a stream if a segment has a stage for GPUs. Returns the
        temporary files of kept documents.

        `names`: the segments' kinds of recorded tasks; `tasks`: the recorded tasks of the first segment.
        """
        runs, scoring = list[SpilledRun](), [stage.named() for part in parts for _, stage in part if stage.gpu]
        if scoring and (count := gpus.awaited(self.flow, scoring)):
            runs, left = self._streamed(curated, self._plan(parts, names, explained, count), tasks)
            if not left:
                return runs
            tasks = iter(left)
        return runs + self._recorded(curated, parts, names, tasks)

    def _streamed(self, curated: Curated, plan: StreamPlan, tasks: Iterator[Task]) -> tuple[list[SpilledRun], list[Task]]:
        """Runs tasks through a stream. Returns the temporary files of kept documents, and the tasks that the stream left out."""
        from heliostat.curation import streaming  # takes a second, because it imports Ray Data

        taken, left = dict[int, list[SpilledRun]](), list[Task]()
        for number, task, record in streaming.run(self.flow, plan, tasks):
            if record is None:
                left.append(task)
            else:
                for part in record["records"]:
                    curated.take(part)
                taken[number] = [SpilledRun(*run) for run in record["runs"]]
        return [run for number in sorted(taken) for run in taken[number]], left

    def _recorded(self, curated: Curated, parts: list[Numbered], names: list[str], tasks: Iterator[Task]) -> list[SpilledRun]:
        """Runs segments one after another as recorded tasks."""
        runs = list[SpilledRun]()
        for place, (part, name) in enumerate(zip(parts, names, strict=True)):
            chain = [stage for _, stage in part]
            work = self._over_runs(runs, chain, part[0][0]) if place else tasks
            function = segment.over_pieces if name == "read" else segment.over_run
            runs = self._taken(curated, name, function, work, pooled=any(stage.gpu for stage in chain))
        return runs

    def _plan(self, parts: list[Numbered], names: list[str], explained: bool, count: int) -> StreamPlan:
        chains = [[stage for _, stage in part] for part in parts]
        follows: list[object] = [[number, stage.follows()] for part in parts[1:] for number, stage in part]
        streamed = [StreamPart(name, part[0][0] if part else 0, self._entries(chain))
                    for name, part, chain in zip(names, parts, chains, strict=True)]  # fmt: skip
        scoring = [any(stage.gpu for stage in chain) for chain in chains]
        return StreamPlan(self.source, streamed, scoring, follows, self.run_bytes, explained, count, self.every)

    def _taken(
        self, curated: Curated, kind: str, function: TaskFunction, tasks: Iterator[Task], pooled: bool = False
    ) -> list[SpilledRun]:
        """Runs the tasks of a segment (consecutive stages). Returns the tasks' temporary files of kept documents, in the order of
        the tasks. Keeps only the names of a task's files, because an input may have millions of tasks."""
        records = self.flow.run(kind, function, tasks, pooled=pooled, reads=kind == "read")
        taken = {number: curated.take(record) for number, record in records}
        return [run for number in sorted(taken) for run in taken.pop(number)]

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
        entries, more, input = list[Entry](), recording.arguments(self.every), str(self.identity[0]) if self.identity else ""
        warm = {"warm": True} if self.warm else {}
        for piece in pieces:
            entries = entries or self._entries(stages)
            revised = [(part.path, count) for part in piece if (count := revision(part.path or input))]
            follows_from, before = (
                key("read", self.identity, read, follows, self.run_bytes, explained, identities, *more.items(), *revised)
                for identities in ([part.identity for part in piece], [part.identity_by_time for part in piece])
            )
            yield Task(follows_from, {"piece": piece, "source": self.source, "stages": entries, "run_bytes": self.run_bytes,
                                      "explained": explained, **more, **warm}, {}, sum(part.length for part in piece),
                       careful=True, can_repeat=self.can_repeat, before=before)  # fmt: skip

    def _over_runs(self, runs: list[SpilledRun], stages: list[Stage], number: int) -> CountedTasks:
        """Returns one task per run. Empties the list as the tasks are made, because each task's result replaces its run."""
        follows = [s.follows() for s in stages]
        entries, more = self._entries(stages), recording.arguments(self.every)

        def task(run: SpilledRun) -> Task:
            follows_from = key("stages", self.identity, number, follows, self.run_bytes, run.name, run.decided, *more.items())
            return Task(follows_from, {"run": run, "source": self.source, "stages": entries, "first": number,
                                       "run_bytes": self.run_bytes, **more}, bytes=run.bytes, careful=True)  # fmt: skip

        return CountedTasks(map(task, _emptied(runs)), len(runs))

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


def _emptied(items: list[Item]) -> Iterator[Item]:
    """Yields the items of a list in order, and removes each from the list."""
    items.reverse()
    while items:
        yield items.pop()


def segments(stages: list[Stage]) -> list[Numbered]:
    """Splits a list of stages, with their numbers, into segments. A stage that compares documents or needs a GPU is a segment of
    its own.

    The first segment never has a stage of these kinds, so the first segment may be empty.
    """
    groups: list[Numbered] = [[]]
    for number, stage in enumerate(stages):
        if _alone(stage) or any(_alone(s) for _, s in groups[-1]):
            groups.append([])
        groups[-1].append((number, stage))
    return groups


def kinds(parts: list[Numbered]) -> list[str]:
    """Returns the kinds of recorded tasks that run segments on the temporary files of earlier segments."""
    return [f"stages-{part[0][0]}" for part in parts]


def _compares(part: Numbered) -> bool:
    return any(isinstance(stage, GlobalStage) for _, stage in part)


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
