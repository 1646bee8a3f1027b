"""Runs a segment: the stages between two comparisons of documents. The segment reads pieces of the pipeline's input, or the
temporary files of an earlier segment.

A segment's task reads documents, runs the stages, and writes the kept documents to temporary files (runs). Each run is sorted by
text hash, and its size is at most a share of `memory_limit`. Dropped documents go to a separate temporary file. The stages'
counts go to a tally.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, TypedDict

import numpy as np
import pyarrow as pa

from heliostat.curation import careful, tally
from heliostat.curation.careful import Careful
from heliostat.curation.chain import BATCH, Chain, Entry, batches, bytes_of
from heliostat.curation.pieces import FilePart
from heliostat.curation.recording import is_recorded, key_of
from heliostat.curation.stage import Document, Dropped, Picture
from heliostat.storage.locations import Location
from heliostat.tasks import care, cpu_time, spill
from heliostat.tasks.care import Care, Crash
from heliostat.tasks.spill import SpilledRun, survivors

RUN = pa.schema(
    [("key", pa.uint64()), ("row", pa.uint32()), ("hash", pa.binary(32)), ("id", pa.large_string()), ("bytes", pa.int64()),
     ("columns", pa.large_string()), ("text", pa.large_string())]
)  # fmt: skip
PICTURES = pa.schema(
    [*RUN, ("image", pa.large_binary()), ("looks", pa.int64()), ("width", pa.int32()), ("height", pa.int32())]
)  # images, with captions as texts; `hash` is the hash of the pixels
LEFT_OUT = pa.schema(
    [
        ("key", pa.uint64()),
        *((name, pa.large_string()) for name in ("id", "stage", "reason", "detail", "measures", "hash", "columns")),
    ]
)
READ = careful.READ  # the stage of reading, for drops during reading
FINISH = "finish"  # the stage of the requirements for texts after all stages
LEFT_OUT_ROWS, LEFT_OUT_BYTES = 20_000, 64 << 20  # maximum rows in memory as Python objects; then they are spilled
EXAMPLES = 3  # ids that are listed per reason
DECIDED = pa.schema([("key", pa.uint64()), ("row", pa.uint32())])
Row = tuple[Any, ...]  # Arrow values


class SegmentRecord(TypedDict):
    """Describes the record of a task that ran documents through stages: the names of its temporary files, and counts of dropped
    documents by reason."""

    runs: list[tuple[str, int, int]]
    left_out: list[str]
    reasons: dict[str, int]
    examples: dict[str, list[str]]
    tally: str | None
    files: list[str]


class DocumentSource(Protocol):
    """Reads an input's documents in a task. Ray sends an object of this class to the task.

    `by_text`: whether `finish` depends only on a document's text. Then it isn't called for a text that is as it was read.
    """

    by_text: ClassVar[bool]

    def read(self, part: FilePart) -> Iterator[Document | Dropped]:
        """Yields the documents of a part of the input, and reports of dropped documents."""
        ...

    def finish(self, document: Document) -> Document | Dropped:
        """Converts a document to the form that shards store, after all stages. Returns `Dropped` if the document must be
        dropped."""
        ...


def packed(columns: Mapping[str, object] | None) -> str | None:
    """Returns a document's columns as JSON; None if the document has no columns."""
    return json.dumps(columns, sort_keys=True, default=str) if columns else None


def by_run(folder: Location, first: int, count: int, names: list[str]) -> Iterator[tuple[int, pa.Table]]:
    """Yields (number of a temporary file of documents, sorted rows about the file's documents) for each file that has rows.

    The key of a row is the document's position: (number of the file) << 32 | row in the file.
    """
    return of_runs(list(spill.read_all(folder, names, first << 32, (first + count) << 32)))


def of_runs(tables: list[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """Yields the rows of tables by their temporary file of documents, like `by_run`. Empties the list."""
    if tables:
        table = pa.concat_tables(tables).sort_by("key")
        tables.clear()
        numbers, starts = np.unique(table["key"].to_numpy() >> np.uint64(32), return_index=True)
        for number, start, stop in zip(numbers.tolist(), starts.tolist(), [*starts[1:].tolist(), len(table)], strict=True):
            yield number, table.slice(start, stop - start)


def over_pieces(folder: Location, piece: list[FilePart], source: DocumentSource, stages: list[Entry], run_bytes: int,
                explained: bool, care: Care | None = None, every: int = 1, warm: bool = False) -> dict[str, object]:  # fmt: skip
    """Runs the stages of a segment on one piece of the input; returns the task's record. With `explained`, also counts the
    documents that are read. With `warm`, the first task of a process first runs some documents without a result, so that the
    seconds of a small piece are those of a process that has read much. `every`: see `recording`."""
    start = cpu_time.now()
    chain = Chain(folder, stages)
    if warm and care is None and (chain_key := _identity(source, stages)) not in _warmed:
        _warmed.add(chain_key)
        _warm(piece, source, Chain(folder, stages))
    opening = cpu_time.now() - start
    taking = Careful(care)
    documents = taking.reading(piece, source.read)
    out = Spiller(folder, run_bytes, every)
    runs = _run(counted(documents, chain.tally) if explained else documents, source, chain, out, taking)
    return runs | {"opening": opening}


_warmed = set[str]()  # sources and stages (`_identity`) that this process has warmed up


def _identity(source: DocumentSource, stages: list[Entry]) -> str:
    return json.dumps([type(source).__qualname__, *([entry, follows] for entry, follows, _ in stages)])


def _warm(piece: list[FilePart], source: DocumentSource, chain: Chain) -> None:
    """Runs the first batch of a piece through the stages, and drops the result. So the process has loaded its libraries, and has
    filled its caches. Ignores errors, because the piece is processed again."""
    pa.array([0])  # imports pandas in 0.2 s, also if the stages keep no document of the batch
    with suppress(Exception):
        documents, _ = next(batches(document for part in piece for document in source.read(part)))
        finished = [source.finish(document) for document in chain.run(documents)[0]]
        _table([row_of(document) for document in finished if isinstance(document, Document)])


def over_run(folder: Location, run: SpilledRun, source: DocumentSource, stages: list[Entry], first: int, run_bytes: int,
             care: Care | None = None, every: int = 1) -> dict[str, object]:  # fmt: skip
    """Runs the stages of a segment, from number `first`, on one temporary file of documents from the previous segment. Returns
    the task's record."""
    start = cpu_time.now()
    chain = Chain(folder, stages, first)
    opening = cpu_time.now() - start
    runs = _run((d for _, d in documents_of(folder, run)), source, chain, Spiller(folder, run_bytes, every), Careful(care))
    return runs | {"opening": opening}


def counted(documents: Iterable[Document | Dropped], counts: tally.Tally) -> Iterator[Document | Dropped]:
    """Yields the documents that a task reads, unchanged. Counts the documents and the CPU seconds of reading in `counts`."""
    entry, reading = tally.entry(counts, READ), iter(documents)
    while True:
        start = cpu_time.now()
        item = next(reading, None)
        entry["seconds"] += cpu_time.now() - start
        if item is None:
            break
        entry["documents"] += 1
        if isinstance(item, Dropped):
            entry["dropped"][item.reason] = entry["dropped"].get(item.reason, 0) + 1
        else:
            entry["kept"] += 1
            entry["kept_bytes"] += bytes_of(item)
        yield item
    entry["bytes"] = entry["kept_bytes"]  # the bytes of dropped documents are unknown


def documents_of(folder: Location, run: SpilledRun) -> Iterator[tuple[int, Document]]:
    """Yields (row, document) for each document in a temporary file that wasn't dropped later."""
    for table in survivors(folder, run):
        yield from documents_in(table)


def documents_in(table: pa.Table) -> Iterator[tuple[int, Document]]:
    """Yields (row, document) for each row of a table of documents."""
    for part in table.to_batches(max_chunksize=BATCH):
        for row in part.to_pylist():
            columns = json.loads(row["columns"]) if row["columns"] else {}
            yield row["row"], Document(row["id"], row["text"], columns, _picture(row) if "image" in row else None)


def _picture(row: dict[str, Any]) -> Picture:
    return Picture(row["image"], row["hash"], row["looks"], (row["width"], row["height"]))


def _unfinished(document: Document) -> bool:
    """Checks whether a document is still in the form in which it was read: undecoded bytes, or an image without a hash."""
    return isinstance(document.text, bytes) or (document.picture is not None and not document.picture.hash)


def _run(documents: Iterable[Document | Dropped], source: DocumentSource, chain: Chain, out: Spiller,
         taking: Careful) -> dict[str, object]:  # fmt: skip
    stages = (Collecting if taking.care is None else _Undoing)(chain, source, out)
    for batch, left_out in batches(documents):
        for item in left_out:
            out.leave_out(item.id, READ, item.reason, item.detail)
        taking.take(batch, stages)
    return out.record(chain.tally) | ({"unread": taking.unread} if taking.unread else {})


@dataclass
class Collecting(careful.Through):
    """Runs documents through a chain of stages, and collects the kept and the dropped documents."""

    chain: Chain
    source: DocumentSource
    out: Spiller

    def batch(self, documents: list[Document], about: Callable[[str], None] = lambda stage: None) -> None:
        texts = [document.text for document in documents]  # kept, so that no new text has the same id
        as_read = {id(text) for text in texts} if not self.chain.stages or self.source.by_text else set[int]()
        kept, dropped = self.chain.run(documents, about)
        about(FINISH)
        gone, rows = [left_out(*fields) for fields in dropped], list[Row]()
        for document in kept:
            item = document if id(document.text) in as_read and not _unfinished(document) else self.source.finish(document)
            if isinstance(item, Dropped):
                dropped_counts = tally.entry(self.chain.tally, FINISH)["dropped"]
                dropped_counts[item.reason] = dropped_counts.get(item.reason, 0) + 1
                gone.append(left_out(item.id, FINISH, item.reason, item.detail, columns=document.columns))
            else:
                rows.append(row_of(item))
        for fields in gone:  # spilling a stage's columns may fail, so this comes before any other change
            self.out.hold_left_out(fields)
        for row in rows:
            self.out.hold(row)

    def leave_out(self, document: Document, crash: Crash) -> None:
        careful.count(self.chain.tally, [name for name, *_ in self.chain.stages], crash, bytes_of(document))
        self.out.leave_out(document.id, crash.stage, care.CRASHED, crash.detail, columns=document.columns)


class _Undoing(Collecting):
    """Runs documents through a chain of stages. If a stage raises an error, undoes all counts and changes of the batch."""

    def batch(self, documents: list[Document], about: Callable[[str], None] = lambda stage: None) -> None:
        counts, self.chain.tally = self.chain.tally, {}
        try:
            super().batch([replace(d, columns=dict(d.columns)) for d in documents], about)
            tally.add(counts, self.chain.tally)
        finally:
            self.chain.tally = counts


def row_of(document: Document) -> Row:
    """Returns a document as a row of a temporary file (schema RUN or PICTURES), without `key` and `row`."""
    assert isinstance(document.text, str)
    raw, picture = document.text.encode(), document.picture
    digest, size = (picture.hash, len(raw) + len(picture.data)) if picture else (hashlib.sha256(raw).digest(), len(raw))
    image = (picture.data, picture.looks, *picture.size) if picture else ()
    return digest, document.id, size, packed(document.columns), raw, *image


def left_out(id: str, stage: str, reason: str, detail: str, measures: dict[str, float] | None = None,
             columns: Mapping[str, object] | str | None = None) -> Row:  # fmt: skip
    """Returns the row about a dropped document, with the fields of LEFT_OUT."""
    numbers, kept = json.dumps(measures) if measures else None, columns if isinstance(columns, str) else packed(columns)
    return key_of(id), id, stage, reason, detail, numbers, None, kept


@dataclass
class Spiller:
    """Collects a task's kept and dropped documents in memory, and writes each list to a temporary file when the list is large.

    Counts all dropped documents, and writes only those that the dataset records (`recording`).
    """

    folder: Location
    run_bytes: int
    every: int = 1
    runs: list[SpilledRun] = field(default_factory=list)
    spilled: list[str] = field(default_factory=list)  # spills of dropped documents
    rows: list[Row] = field(default_factory=list)  # (hash, id, bytes, columns, UTF-8 text), the image's columns
    out: list[Row] = field(default_factory=list)  # rows of LEFT_OUT
    size: int = 0
    out_size: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, document: Document) -> None:
        self.hold(row_of(document))

    def hold(self, row: Row) -> None:
        """Adds the row of a kept document. Writes the collected rows to a temporary file if they exceed `run_bytes`."""
        self.rows.append(row)
        self.size += row[2] + len(row[3] or "") + 200
        if self.size >= self.run_bytes:
            self.spill()

    def leave_out(self, id: str, stage: str, reason: str, detail: str, measures: dict[str, float] | None = None,
                  columns: Mapping[str, object] | str | None = None) -> None:  # fmt: skip
        self.hold_left_out(left_out(id, stage, reason, detail, measures, columns))

    def hold_left_out(self, row: Row) -> None:
        """Adds the row of a dropped document. Writes the collected rows to a temporary file if there are many."""
        key, id, stage, reason, detail, _, _, columns = row
        if is_recorded(key, reason, self.every):
            self.out.append(row)
            self.out_size += len(id) + len(detail) + len(columns or "")
        name = reason if stage in (READ, FINISH) or reason == care.CRASHED else f"{stage}: {reason}"
        self.reasons[name] += 1
        self.examples[name] = heapq.nsmallest(EXAMPLES, [*self.examples.get(name, []), id])
        if len(self.out) >= LEFT_OUT_ROWS or self.out_size >= LEFT_OUT_BYTES:
            self.spill_left_out()

    def spill(self) -> None:
        """Keeps the collected documents as a table. Rows are sorted by hash, then id, and numbered in that order."""
        self.rows.sort(key=lambda row: (row[0], row[1]))
        table, bytes = _table(self.rows), sum(row[2] for row in self.rows)
        self.rows, self.size = [], 0  # freed before the file is made, because the file takes as much memory
        self.keep(table, bytes)

    def keep(self, table: pa.Table, bytes: int) -> None:
        """Writes a table of kept documents to a temporary file. `bytes`: the size of the documents."""
        self.runs.append(SpilledRun(spill.write_sorted(self.folder, table), len(table), bytes))

    def spill_left_out(self) -> None:
        table = pa.Table.from_arrays(
            [pa.array(v, kind.type) for v, kind in zip(zip(*self.out, strict=True), LEFT_OUT, strict=True)], schema=LEFT_OUT
        )
        self.out, self.out_size = [], 0
        self.spilled.append(spill.write(self.folder, table, ("id", "stage", "reason", "detail")))

    def record(self, counts: tally.Tally) -> SegmentRecord:
        """Writes the remaining documents to temporary files, and returns the task's record."""
        if self.rows:
            self.spill()
        if self.out:
            self.spill_left_out()
        stored_counts = store(self.folder, counts) if counts else None
        return {
            "runs": [(run.name, run.rows, run.bytes) for run in self.runs],
            "left_out": self.spilled,
            "reasons": dict(sorted(self.reasons.items())),
            "examples": dict(sorted(self.examples.items())),
            "tally": stored_counts,
            "files": [*(run.name for run in self.runs), *self.spilled, *([stored_counts] if stored_counts else [])],
        }


def _table(rows: list[Row]) -> pa.Table:
    """Builds the table for a temporary file of documents from sorted rows."""
    hashes, *others = zip(*rows, strict=True)
    keys = np.frombuffer(b"".join(hashes), ">u8")[::4].astype(np.uint64)
    schema = PICTURES if len(others) > 4 else RUN
    columns = (keys, range(len(rows)), hashes, *others)
    return pa.Table.from_arrays([pa.array(v, kind.type) for v, kind in zip(columns, schema, strict=True)], schema=schema)


def store(folder: Location, value: object) -> str:
    """Writes a JSON value to the folder of temporary files. Returns the file's name, which is derived from the value."""
    return spill.put(folder, _encoded(value), ".json")


def name_of(value: object) -> str:
    """Returns the name of the file to which `store` writes this JSON value."""
    return spill.named(_encoded(value), ".json")


def _encoded(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()


def load(folder: Location, name: str) -> Any:
    """Reads the JSON value that `store` wrote to the file of this name."""
    with spill.whole(folder, name):
        return json.loads(folder.join(name).read())
