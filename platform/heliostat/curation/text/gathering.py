"""Gathers documents for a dataset's shards, without exact duplicates. If a pipeline has the key `together`, related documents
are next to each other.

Documents are sorted by the hashes of their texts. This order also decides which documents are held out. With `together`, a second
shuffle sorts documents by the hash of the value that related documents have in common, such as a repository's name. So related
documents are in one shard, and are held out together. The first shuffle, by texts, finds exact duplicates.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from heliostat.curation import segment
from heliostat.curation.recording import key_of, recorded
from heliostat.curation.segment import SpilledRun
from heliostat.schema import Strict
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.spill import survivors_of


class Together(Strict):
    """Configures which documents are next to each other in the dataset. If the YAML has a string instead of a mapping, the string
    is the value of `column`."""

    column: str = Field(min_length=1)
    """Column that groups documents, such as `repository`: documents with the same value follow each other."""
    order: str | None = Field(None, min_length=1)
    """Column that orders the documents of a group, compared as text. Unset: the order of ids, which are paths for files of
    repositories."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: object) -> object:
        return {"column": value} if isinstance(value, str) else value


ENDS = 10_000  # documents whose fates are Python objects at the same time
ENDS_ORDER = ("id", "stage", "reason", "detail")
HELD_BYTES = 1 << 24  # minimum bytes in memory before equal texts are searched and exact duplicates are spilled
SHOWN = 200  # characters of a value in an error
RUN = pa.schema([*segment.RUN, ("group", pa.binary(32)), ("order", pa.large_string())])
TOLD = ["hash", "id", "columns", "bytes", "text", "group", "order"]


def regroup(
    folder: Location, runs: list[SpilledRun], low: int, high: int, by: dict[str, str | None], explained: bool, every: int = 1
) -> dict[str, object]:
    """Reads the documents in a range of keys, and drops exact duplicates. Writes the kept documents to a temporary file, sorted
    by the hash of the value that related documents have in common. Returns a record with the names of the files."""
    table, duplicates = gather(folder, runs, low, high, True)
    if table is None:
        return {"runs": [], "duplicates": 0, "ends": [], "files": []}
    columns = [json.loads(text) if text else {} for text in table["columns"].to_pylist()]
    groups = [group(one.get(by["column"]), digest) for one, digest in zip(columns, table["hash"].to_pylist(), strict=True)]
    order = [_plain(value) if (value := one.get(by["order"])) is not None else "" for one in columns]
    keys = np.frombuffer(b"".join(groups), ">u8")[::4].astype(np.uint64)
    values = {name: table[name] for name in table.column_names} | {
        "key": keys,
        "row": range(len(table)),
        "group": groups,
        "order": order,
    }
    again = pa.Table.from_arrays([_array(values[kind.name], kind.type) for kind in RUN], schema=RUN)
    name = spill.write(folder, again, ("group", "order", "id"))
    ends = list(spill_duplicates(folder, table, duplicates, every)) if explained else []
    return {"runs": [[name, len(table), int(table["bytes"].to_numpy().sum())]], "duplicates": duplicates.count,
            "ends": ends, "files": [name, *ends]}  # fmt: skip


def _plain(value: object) -> str:
    """Converts a column's value to text that UTF-8 can represent. Half of a surrogate pair, which JSON allows, becomes a
    backslash escape."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _array(values: Any, kind: pa.DataType) -> Any:
    return values.cast(kind) if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)


def group(value: object, digest: bytes) -> bytes:
    """Returns the hash that determines a document's position: the hash of the column value that related documents share. For a
    document without a value, returns `digest`, the hash of the text."""
    if value is None or value == "":
        return digest
    return hashlib.sha256(f"together\0{value}".encode("utf-8", "surrogatepass")).digest()


def grouped(folder: Location, runs: list[SpilledRun], low: int, high: int) -> pa.Table | None:
    """Reads the documents in a range of keys from the temporary files of `regroup`. Related documents are next to each other.
    Returns None if there are no documents."""
    tables = list(survivors_of(folder, runs, low, high, TOLD))
    if not tables:
        return None
    return pa.concat_tables(tables).sort_by([(name, "ascending") for name in ("group", "order", "id")])


def largest(folder: Location, runs: list[SpilledRun], low: int, high: int, column: str) -> dict[str, object]:
    """Finds the value of `column` whose documents together have the most bytes, in a range of keys of the temporary files of
    `regroup`. Returns the value and the bytes."""
    sizes = Counter[bytes]()
    for table in survivors_of(folder, runs, low, high, ["hash", "group", "bytes"]):
        summed = _in_groups(table).group_by("group").aggregate([("bytes", "sum")])
        sizes.update(dict(zip(summed["group"].to_pylist(), summed["bytes_sum"].to_pylist(), strict=True)))
    if not sizes:
        return {"bytes": 0, "value": None}
    most, digest = max((size, digest) for digest, size in sizes.items())
    return {"bytes": most, "value": _value(folder, runs, digest, column)}


def _value(folder: Location, runs: list[SpilledRun], digest: bytes, column: str) -> str:
    first = int.from_bytes(digest[:8], "big")
    tables = survivors_of(folder, runs, first, first + 1, ["group", "columns"])
    texts = (text for t in tables for text in t.filter(pc.equal(t["group"], pa.scalar(digest, t["group"].type)))["columns"])
    return _plain(json.loads(next(texts).as_py())[column])[:SHOWN]


def _in_groups(table: pa.Table) -> pa.Table:
    return table.filter(pc.not_equal(table["group"], table["hash"]))


def counted(table: pa.Table) -> dict[str, int]:
    """Counts the groups of related documents in a shard, and the documents in these groups."""
    apart = _in_groups(table)
    return {"groups": pc.count_distinct(apart["group"]).as_py(), "documents": len(apart)}


def unique(tables: list[pa.Table]) -> tuple[pa.Table, pa.Table]:
    """Joins tables, sorts the rows by hash, and keeps one row per hash: the row with the smallest id. Returns two tables: the
    kept rows, and the removed rows.

    Empties the list `tables`, so that memory has at most two copies of the rows.
    """
    table = pa.concat_tables(tables).combine_chunks()
    tables.clear()
    order = pc.sort_indices(table.select(["hash", "id"]), [("hash", "ascending"), ("id", "ascending")])
    if not len(table):
        return table, table
    hashes = pc.take(table["hash"], order).combine_chunks()
    first = np.concatenate(
        [[True], pc.not_equal(hashes.slice(1), hashes.slice(0, len(hashes) - 1)).to_numpy(zero_copy_only=False)]
    )
    return table.take(order.filter(pa.array(first))), table.take(order.filter(pa.array(~first)))


@dataclass
class Duplicates:
    """Counts exact duplicates. With `listed`, also collects the rows of the duplicates, and writes these rows to temporary files
    if there are many."""

    folder: Location
    listed: bool
    count: int = 0
    rows: list[pa.Table] = field(default_factory=list)
    spilled: list[str] = field(default_factory=list)

    def add(self, table: pa.Table) -> None:
        self.count += len(table)
        if self.listed and len(table):
            self.rows.append(table.select(["key", "hash", "id", "columns"]))
            if sum(part.nbytes for part in self.rows) > HELD_BYTES:
                self.spilled.append(spill.write(self.folder, pa.concat_tables(self.rows), ("id",)))
                self.rows = []

    def tables(self) -> Iterator[pa.Table]:
        """Yields the collected rows of the duplicates, in tables that fit into memory."""
        yield from self.rows
        for name in self.spilled:
            yield from spill.read(self.folder, name)


def gather(folder: Location, runs: list[SpilledRun], low: int, high: int, columns: bool) -> tuple[pa.Table | None, Duplicates]:
    """Reads the documents in a range of keys. Of documents with equal texts, keeps the document with the smallest id. Returns the
    kept documents (None if there are none), and the exact duplicates without texts.

    Needs at most twice the memory of the kept texts. With `columns`, the columns of all documents are in memory, too.
    """
    waiting, kept_bytes, new_bytes = list[pa.Table](), HELD_BYTES, 0
    wanted = ["hash", "id", *(["columns"] if columns else [])]
    duplicates = Duplicates(folder, columns)
    for table in survivors_of(folder, runs, low, high, [*wanted, "bytes", "text"]):
        waiting.append(table)
        new_bytes += table.nbytes
        if new_bytes > kept_bytes:
            table, gone = unique(waiting)
            duplicates.add(gone)
            waiting, kept_bytes, new_bytes = [table], max(HELD_BYTES, table.nbytes), 0
    if not waiting:
        return None, duplicates
    table, gone = unique(waiting)
    duplicates.add(gone)
    return table, duplicates


def spill_kept(folder: Location, path: str, kept: pa.Table, duplicates: Duplicates, every: int = 1) -> list[str]:
    """Writes the outcomes of a shard's documents (kept) and of their exact duplicates (dropped) to temporary files. Writes only
    the documents that the dataset records (`recording`). Returns the files' names."""
    rows = pa.concat_tables(_end(recorded(part, every), "shard", "kept", path) for part in _some(kept))
    names = [spill.write(folder, rows, ENDS_ORDER)] if len(rows) else []
    return [*names, *spill_duplicates(folder, kept, duplicates, every)]


def spill_duplicates(folder: Location, kept: pa.Table, duplicates: Duplicates, every: int = 1) -> Iterator[str]:
    """Writes the outcomes of exact duplicates (dropped), each with the id of the kept document, to temporary files. Writes only
    the documents that the dataset records (`recording`). Yields the files' names."""
    if not duplicates.count:
        return
    repeated = {digest for table in duplicates.tables() for part in _some(table) for digest, _ in _pairs(recorded(part, every))}
    stayed = {digest: id for digest, id in _pairs(kept) if digest in repeated}
    waiting, size = list[pa.Table](), 0
    for part in filter(len, (recorded(part, every) for table in duplicates.tables() for part in _some(table))):
        waiting.append(_end(part, "exact", "duplicate", [stayed[digest] for digest, _ in _pairs(part)]))
        size += waiting[-1].nbytes
        if size > HELD_BYTES:
            yield spill.write(folder, pa.concat_tables(waiting), ENDS_ORDER)
            waiting, size = [], 0
    if waiting:
        yield spill.write(folder, pa.concat_tables(waiting), ENDS_ORDER)


def _some(table: pa.Table) -> Iterator[pa.Table]:
    return (table.slice(start, ENDS) for start in range(0, len(table), ENDS))


def _pairs(table: pa.Table) -> Iterator[tuple[bytes, str]]:
    """Yields (hash, id) for each document of a table."""
    for part in _some(table):
        yield from zip(part["hash"].to_pylist(), part["id"].to_pylist(), strict=True)


def _end(part: pa.Table, stage: str, reason: str, detail: str | list[str]) -> pa.Table:
    rows = len(part)
    keys = [key_of(id) for id in part["id"].to_pylist()]
    hashes = [digest.hex() for digest in part["hash"].to_pylist()]
    columns = [keys, part["id"], [stage] * rows, [reason] * rows, [detail] * rows if isinstance(detail, str) else detail,
               [None] * rows, hashes, part["columns"]]  # fmt: skip
    out = [c if isinstance(c, pa.ChunkedArray) else pa.array(c, f.type) for c, f in zip(columns, segment.LEFT_OUT, strict=True)]
    return pa.Table.from_arrays(out, schema=segment.LEFT_OUT)
