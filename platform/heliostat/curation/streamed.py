"""Runs the parts of a stream in Ray Data's workers: reading with the first filters, scoring in actors, and writing.

A part is a segment of stages. A task's documents pass from part to part as blocks in Ray's object store, each with at most
`run_bytes` of documents. A block has the tables that a segment's task would write to temporary files, and the records that this
task would write. So a stream gives the same temporary files and records as the segments' tasks, but writes only the last ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
from ray.util.queue import Queue

from heliostat.curation import segment, tally
from heliostat.curation.chain import Chain, Entry, batches
from heliostat.curation.pieces import FilePart
from heliostat.curation.segment import READ, Collecting, DocumentSource, SpilledRun, Spiller
from heliostat.curation.stage import Document, Dropped
from heliostat.errors import innermost
from heliostat.storage.locations import Location
from heliostat.tasks import care, cpu_time, shipping, spill
from heliostat.tasks.clusters import Task
from heliostat.tasks.work import key

BLOCK = pa.schema(
    [("task", pa.int64()), ("block", pa.int32()), ("last", pa.bool_()), ("records", pa.large_string()),
     ("tables", pa.large_binary()), ("error", pa.large_string())]
)  # fmt: skip
KIND = "stream"  # of the records and the progress line
COPY_S = 1.0  # seconds between checks of whether the driver has copied a stage's files to the work folder
Opened = TypeVar("Opened")
Item = list[FilePart] | SpilledRun
"""A task's documents: pieces of the pipeline's input, or a temporary file of an earlier task."""


class Operators(NamedTuple):
    """Holds the operators of a stream, from blocks to blocks. `read` gets what `StreamForm.sent` returns. `scorer` is a class for
    actors, which gets the `arguments`."""

    read: Callable[[pa.Table], Iterator[pa.Table]]
    scorer: type
    arguments: tuple[object, ...]
    write: Callable[[pa.Table], Iterator[pa.Table]]


class StreamForm(Protocol):
    """Declares what a stream needs of a pipeline. `kind`: of the recorded tasks for the same work; `gpus`: the maximum number of
    actors; `gpus_each`: the GPUs of each."""

    @property
    def kind(self) -> str: ...
    @property
    def gpus(self) -> int: ...
    @property
    def gpus_each(self) -> float: ...

    def key(self, task: str) -> str:
        """Returns the key of a task's record in the stream. `task`: the key of the recorded task."""

    def sent(self, number: int, task: Task) -> bytes:
        """Encodes a task for the operators."""

    def operators(self, folder: Location, lacking: Queue) -> Operators:
        """Makes the operators. `folder`: for temporary files; `lacking`: see `with_files`."""


@dataclass(frozen=True)
class StreamPart:
    """Describes a segment of the stream: the kind of its recorded tasks, the number of its first stage, and its stages."""

    kind: str
    first: int
    stages: list[Entry]


@dataclass(frozen=True)
class StreamPlan:
    """Describes a stream. `parts`: its segments; `scoring`: for each segment, whether it has a stage for GPUs; `follows`:
    everything that the segments after the first depend on; `gpus`: the maximum number of actors; `every`: see `recording`."""

    source: DocumentSource
    parts: list[StreamPart]
    scoring: list[bool]
    follows: list[object]
    run_bytes: int
    explained: bool
    gpus: int
    every: int = 1
    gpus_each = 1.0

    def key(self, task: str) -> str:
        """Returns the key of a task's record in the stream. `task`: the key of the recorded task for the first segment."""
        return key(KIND, task, self.follows)

    @property
    def kind(self) -> str:
        return self.parts[0].kind

    def sent(self, number: int, task: Task) -> bytes:
        return sent(number, task.arguments["run"] if "run" in task.arguments else task.arguments["piece"])

    def operators(self, folder: Location, lacking: Queue) -> Operators:
        streamed = Streamed(folder, self.source, self.run_bytes, self.explained, self.every, lacking)
        before, scoring, after = self.split()
        return Operators(ReadBlocks(streamed, before), ScoreBlocks, (streamed, scoring), WriteBlocks(streamed, after))

    def split(self) -> tuple[StreamPart | None, list[StreamPart], list[StreamPart]]:
        """Returns the segment before the scoring stages, the segments from the first to the last scoring stage, and the segments
        after them."""
        first, last = self.scoring.index(True), len(self.scoring) - self.scoring[::-1].index(True)
        return self.parts[0] if first else None, self.parts[first:last], self.parts[last:]


def with_files(lacking: Queue, open: Callable[[], Opened]) -> Opened:
    """Calls a function that needs files from the driver. Puts the files that this node lacks into the queue `lacking`, and waits
    until the driver has copied these files."""
    until, requested = time.monotonic() + shipping.WAIT_S, list[shipping.Shipment]()
    while True:
        try:
            return open()
        except shipping.NotHereError as e:
            if time.monotonic() > until:
                raise
            if e.shipment not in requested:
                requested.append(e.shipment)
                lacking.put(e.shipment)
            time.sleep(COPY_S)


@dataclass(frozen=True)
class Streamed:
    """Holds everything that the workers of a stream need. `lacking`: the workers put the files here that their node lacks, and
    the driver copies these files to the work folder."""

    folder: Location
    source: DocumentSource
    run_bytes: int
    explained: bool
    every: int
    lacking: Queue

    def chain(self, part: StreamPart) -> Chain:
        """Opens a part's stages. Waits until the driver has copied the files that this node lacks."""
        return with_files(self.lacking, lambda: Chain(self.folder, part.stages, part.first))

    def through(self, part: StreamPart, tables: list[pa.Table]) -> tuple[list[pa.Table], dict[str, Any]]:
        """Runs the documents of some tables through a part's stages. Returns the tables of the kept documents, and the part's
        record."""
        watch = Stopwatch()
        chain = self.chain(part)
        watch.opened()
        out, kept = Held(self.folder, self.run_bytes, self.every), list[pa.Table]()
        for table in tables:
            kept += held((d for _, d in segment.documents_in(table)), self.source, chain, out)
        return kept, out.noted(chain.tally) | watch.times(part.kind)


@dataclass
class Held(Spiller):
    """Collects a task's kept documents as tables in memory. Dropped documents go to temporary files."""

    tables: list[pa.Table] = field(default_factory=list)
    passed: int = 0
    """Number of kept documents so far."""

    def keep(self, table: pa.Table, bytes: int) -> None:
        self.tables.append(table)
        self.passed += len(table)

    def noted(self, counts: tally.Tally) -> dict[str, Any]:
        """Returns the task's record, with the number of kept documents."""
        return {**self.record(counts), "passed": self.passed}


def held(documents: Iterable[Document | Dropped], source: DocumentSource, chain: Chain, out: Held) -> Iterator[pa.Table]:
    """Runs documents through a chain of stages. Yields the tables of the kept documents, each as soon as it is full."""
    stages = Collecting(chain, source, out)
    for batch, left_out in batches(documents):
        for item in left_out:
            out.leave_out(item.id, READ, item.reason, item.detail)
        stages.batch(batch)
        yield from out.tables
        out.tables = []
    if out.rows:
        out.spill()
    yield from out.tables
    out.tables = []


class Stopwatch:
    """Measures a part's work on one task: CPU seconds, wall-clock seconds without pauses, and the times of begin and end."""

    def __init__(self) -> None:
        self.began, self.start, self.cpu = time.time(), time.monotonic(), cpu_time.now()
        self.opening = self.paused = 0.0

    def opened(self) -> None:
        """Notes that the stages are open. The seconds so far count as `opening`."""
        self.opening = cpu_time.now() - self.cpu

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Excludes the time of the context, in which Ray Data makes the task wait."""
        start = time.monotonic()
        yield
        self.paused += time.monotonic() - start

    def times(self, kind: str) -> dict[str, Any]:
        wall = time.monotonic() - self.start - self.paused
        return {"kind": kind, "opening": self.opening, "seconds": round(cpu_time.now() - self.cpu, 3), "wall": round(wall, 3),
                "span": [round(self.began, 3), round(time.time(), 3)]}  # fmt: skip


@dataclass(frozen=True)
class ReadBlocks:
    """Reads tasks' documents, and runs them through the stages before the first scoring stage. `part` is None if no stage comes
    before, and the documents are in a temporary file."""

    streamed: Streamed
    part: StreamPart | None

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for sent in filter(None, batch["id"].to_pylist()):
            task, item = received(sent)
            yield from guarded(task, self._blocks(task, item))

    def _blocks(self, task: int, item: Item) -> Iterator[pa.Table]:
        streamed, folder = self.streamed, self.streamed.folder
        if self.part is None:
            assert isinstance(item, SpilledRun)
            tables = list(spill.survivors(folder, item))
            yield block(task, 0, True, [], [pa.concat_tables(tables)] if tables else [])
            return
        watch = Stopwatch()
        chain, out = streamed.chain(self.part), Held(folder, streamed.run_bytes, streamed.every)
        watch.opened()
        documents: Iterable[Document | Dropped]
        if isinstance(item, SpilledRun):
            documents = (d for _, d in segment.documents_of(folder, item))
        else:
            documents = (d for part in item for d in streamed.source.read(part))
            documents = segment.counted(documents, chain.tally) if streamed.explained else documents
        number, waiting = 0, list[pa.Table]()  # a block is sent when the next one is ready, so that the last one is known
        for table in held(documents, streamed.source, chain, out):
            if waiting:
                with watch.pause():
                    yield block(task, number, False, [], waiting)
                number += 1
            waiting = [table]
        yield block(task, number, True, [out.noted(chain.tally) | watch.times(self.part.kind)], waiting)


class ScoreBlocks:
    """Runs blocks through the stages from the first to the last scoring stage, in an actor that keeps the models."""

    def __init__(self, streamed: Streamed, parts: list[StreamPart]) -> None:
        self.streamed, self.parts = streamed, parts

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield from each(batch, self._scored)

    def _scored(self, one: dict[str, Any]) -> pa.Table:
        return passed(self.streamed, self.parts, one)


@dataclass(frozen=True)
class WriteBlocks:
    """Runs blocks through the stages after the last scoring stage, and writes the kept documents to temporary files. Yields
    blocks without documents, with `records` for the driver."""

    streamed: Streamed
    parts: list[StreamPart]

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        yield from each(batch, self._written)

    def _written(self, one: dict[str, Any]) -> pa.Table:
        (done,) = passed(self.streamed, self.parts, one).to_pylist()
        records = json.loads(done["records"])
        for table in unpacked(done["tables"]):
            name, size = spill.write_sorted(self.streamed.folder, table), pc.sum(table["bytes"]).as_py()
            records[-1]["runs"].append([name, len(table), size])
            records[-1]["files"].append(name)
        return block(done["task"], done["block"], done["last"], records, [])


def passed(streamed: Streamed, parts: list[StreamPart], one: dict[str, Any]) -> pa.Table:
    """Runs a block's documents through some parts; returns the block with the kept documents, and with the parts' records."""
    tables, records = unpacked(one["tables"]), json.loads(one["records"])
    for part in parts:
        tables, record = streamed.through(part, tables)
        records.append(record)
    return block(one["task"], one["block"], one["last"], records, tables)


def each(batch: pa.Table, function: Callable[[dict[str, Any]], pa.Table]) -> Iterator[pa.Table]:
    """Applies a function to each block of a batch. Passes blocks with errors on unchanged."""
    for number in range(len(batch)):
        one = {name: batch[name][number] for name in batch.column_names}
        if one["error"].is_valid:
            yield batch.slice(number, 1)
            continue
        plain = {name: one[name].as_buffer() if name == "tables" else one[name].as_py() for name in one}
        yield from guarded(plain["task"], (function(value) for value in [plain]))


def guarded(task: int, blocks: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yields blocks. If making a block raises an error, yields a block with the error, which ends the task in this stream."""
    try:
        yield from blocks
    except Exception as e:  # noqa: BLE001 - the task runs again outside of the stream, which judges its errors
        cause = innermost(e)
        final = cause is not None and cause.exit_code == 2
        yield block(task, 0, True, [], [], json.dumps({"message": care.last_line(e), "final": final}))


def block(task: int, number: int, last: bool, records: list[dict[str, Any]], tables: list[pa.Table],
          error: str | None = None) -> pa.Table:  # fmt: skip
    """Makes a block, which is a table with one row (schema BLOCK)."""
    values = ([task], [number], [last], [json.dumps(records)], [packed(tables)], [error])
    return pa.Table.from_arrays([pa.array(v, kind.type) for v, kind in zip(values, BLOCK, strict=True)], schema=BLOCK)


def packed(tables: list[pa.Table]) -> bytes:
    """Encodes tables with the same schema as an Arrow stream, each as one record batch."""
    sink = pa.BufferOutputStream()
    if tables:
        with pa.ipc.new_stream(sink, tables[0].schema) as stream:
            for table in tables:
                for part in table.combine_chunks().to_batches():
                    stream.write_batch(part)
    return sink.getvalue().to_pybytes()


def unpacked(data: pa.Buffer | bytes) -> list[pa.Table]:
    """Decodes the tables that `packed` encoded, without a copy."""
    if not len(data):
        return []
    return [pa.Table.from_batches([part]) for part in pa.ipc.open_stream(data)]


def sent(task: int, item: Item) -> bytes:
    """Encodes a task's number and documents for `ReadBlocks`."""
    if isinstance(item, SpilledRun):
        return json.dumps([task, True, [item.name, item.rows, item.bytes, item.decided]]).encode()
    return json.dumps([task, False, [part.fields for part in item]]).encode()


def received(data: bytes) -> tuple[int, Item]:
    """Decodes what `sent` encoded."""
    task, run, fields = json.loads(data)
    if run:
        return task, SpilledRun(*fields)
    return task, list(map(FilePart.of, fields))
