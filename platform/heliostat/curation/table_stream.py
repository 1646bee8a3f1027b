"""Streams tables through a model in actors (`curation.streaming`): CPUs read the tables of tasks, actors compute with the model,
and CPUs write the results to temporary files. A subclass defines these three parts, such as for encoders of images.

A block has a group of a task's tables, so actors share the tables of a large task. The tables are those of the recorded tasks,
so the results are the same.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import pyarrow as pa
from ray.util.queue import Queue

from heliostat.curation.streamed import Operators, Stopwatch, block, each, guarded, unpacked, with_files
from heliostat.storage.locations import Location
from heliostat.tasks.clusters import Task
from heliostat.tasks.work import key

Source = TypeVar("Source")
Model = TypeVar("Model")


@dataclass(frozen=True)
class TableStream(ABC, Generic[Source, Model]):
    """Describes a stream (`streamed.StreamForm`) of tables. `Source`: identifies what a task reads."""

    kind: ClassVar[str]

    gpus: int
    gpus_each: float

    def key(self, task: str) -> str:
        return key("stream", task)

    @abstractmethod
    def sent(self, number: int, task: Task) -> bytes:
        """Encodes a task for `received`."""

    @abstractmethod
    def received(self, data: bytes) -> tuple[int, Source]:
        """Decodes a task's number, and what the task reads."""

    @abstractmethod
    def groups(self, folder: Location, source: Source) -> Iterator[list[pa.Table]]:
        """Reads a task's tables. Yields the tables of each block. `folder`: for temporary files, here and below."""

    @abstractmethod
    def opened(self, folder: Location) -> Model:
        """Loads the model once per process. Raises NotHereError if this node lacks files."""

    @abstractmethod
    def computed(self, model: Model, tables: list[pa.Table]) -> tuple[list[pa.Table], dict[str, Any]]:
        """Computes with the model. Returns the results, and entries of the task's record."""

    @abstractmethod
    def written(self, folder: Location, tables: list[pa.Table]) -> Iterator[dict[str, Any]]:
        """Writes a block's results to temporary files. Yields entries of the task's record."""

    def operators(self, folder: Location, lacking: Queue) -> Operators:
        return Operators(ReadTables(self, folder), ComputeTables, (self, folder, lacking), WriteTables(self, folder))


@dataclass(frozen=True)
class ReadTables:
    """Reads the tables of tasks as blocks."""

    stream: TableStream[Any, Any]
    folder: Location

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for sent in filter(None, batch["id"].to_pylist()):
            task, source = self.stream.received(sent)
            yield from guarded(task, self._blocks(task, self.stream.groups(self.folder, source)))

    def _blocks(self, task: int, groups: Iterator[list[pa.Table]]) -> Iterator[pa.Table]:
        """Yields a task's blocks, each with a record of the time for reading its tables. A block is sent when the next one is
        ready, so that the last one is known."""
        kind, watch, number = self.stream.kind, Stopwatch(), 0
        waiting = next(groups, list[pa.Table]())
        for tables in groups:
            yield block(task, number, False, [noted(kind, watch)], waiting)
            watch, number, waiting = Stopwatch(), number + 1, tables
        yield block(task, number, True, [noted(kind, watch)], waiting)


class ComputeTables:
    """Replaces the tables of blocks with the model's results, in an actor that keeps the model."""

    def __init__(self, stream: TableStream[Any, Any], folder: Location, lacking: Queue) -> None:
        self.stream, self.folder, self.lacking = stream, folder, lacking

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield from each(batch, self._computed)

    def _computed(self, one: dict[str, Any]) -> pa.Table:
        watch, tables = Stopwatch(), unpacked(one["tables"])
        model = with_files(self.lacking, lambda: self.stream.opened(self.folder))
        watch.opened()
        results, entries = self.stream.computed(model, tables)
        records = [*json.loads(one["records"]), noted(self.stream.kind, watch, entries)]
        return block(one["task"], one["block"], one["last"], records, results)


@dataclass(frozen=True)
class WriteTables:
    """Writes the results of blocks to temporary files. Yields blocks with only `records`."""

    stream: TableStream[Any, Any]
    folder: Location

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield from each(batch, self._written)

    def _written(self, one: dict[str, Any]) -> pa.Table:
        watch, records = Stopwatch(), json.loads(one["records"])
        for entries in self.stream.written(self.folder, unpacked(one["tables"])):
            records.append(noted(self.stream.kind, watch, entries))
        return block(one["task"], one["block"], one["last"], records, [])


def noted(kind: str, watch: Stopwatch, entries: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the record of a part that drops no documents."""
    return {"runs": [], "files": [], **(entries or {}), **watch.times(kind)}
