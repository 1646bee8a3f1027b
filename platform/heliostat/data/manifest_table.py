"""Builds the manifest's table: its columns, the order of its rows, its digest, and its encoding.

Paths and footers are in dictionary encoding, so the row groups of a shard share one copy. A table may have many millions of rows.
So the functions that get `Columns` remove each column from this mapping as they go, and at most one column is in memory twice.
The digest and the encoding also work on `StoredRows`, of which only a part is in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from heliostat.data.stored_rows import StoredRows

# keys of the metadata that no digest covers
HUB = "hub"  # names on the Hub, by the pipeline's keys
ERRORS = "stored_errors"  # of the columns with latents and embeddings: {COLUMN: {dtype, relative_error}}
SCHEMA = pa.schema(
    [
        ("path", pa.string()),  # relative to the dataset's folder
        ("row_group", pa.int32()),
        ("rows", pa.int64()),
        ("tokens", pa.int64()),  # 0 for kind "rows"
        ("bytes", pa.int64()),  # compressed bytes of the row group
        ("file_bytes", pa.int64()),
        ("footer", pa.string()),  # hex digest of the file's Parquet footer
        ("place", pa.int64()),  # the maximum of its documents' places, in 1/PLACES; -1: unknown
        ("content", pa.string()),  # hex digest of the row group's stored bytes; "": unknown
    ]
)
# columns of later versions, with the value for unknown: a column with only that value isn't part of the digest
LATER: dict[str, int | str] = {"place": -1, "content": ""}
SHARED = ("path", "footer")  # columns in dictionary encoding
SLICE = 1 << 16  # rows that are processed together, because all at once could take much memory
PARQUET_ROWS = 1 << 20  # rows of a row group of the manifest itself
Columns = dict[str, pa.ChunkedArray]
RowGroups: TypeAlias = pa.Table | StoredRows  # in the manifest's order
Rows: TypeAlias = RowGroups | Sequence[Mapping[str, object]]


def in_order(rows: Rows) -> RowGroups:
    """Returns rows in the manifest's order."""
    return rows if isinstance(rows, StoredRows) else table_of(rows)


def in_memory(rows: RowGroups) -> pa.Table:
    """Returns the rows as a table."""
    if isinstance(rows, pa.Table):
        return rows
    (table,) = rows.parts(SCHEMA.names, max(1, len(rows)))
    return table_of(table)


def parts(rows: RowGroups, names: Sequence[str], size: int) -> Iterator[pa.Table]:
    """Yields some columns as tables of `size` rows; at least one table."""
    if isinstance(rows, StoredRows):
        return rows.parts(names, size)
    return (rows.select(names).slice(start, size) for start in range(0, max(1, len(rows)), size))


def total(rows: RowGroups, name: str) -> int:
    """Sums a column of numbers."""
    return sum(pc.sum(part[name]).as_py() or 0 for part in parts(rows, [name], SLICE))


def table_of(rows: pa.Table | Sequence[Mapping[str, object]]) -> pa.Table:
    """Returns rows with the columns of SCHEMA as a table in the manifest's order: by path, then by row group."""
    table = rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows, schema=SCHEMA)
    columns = dict(zip(table.column_names, table.columns, strict=True))
    for field in SCHEMA:
        if field.name in columns and not (field.name in SHARED and pa.types.is_dictionary(columns[field.name].type)):
            columns[field.name] = columns[field.name].cast(field.type)
    del table, rows
    return ordered(compact(columns))


def compact(columns: Columns) -> Columns:
    """Returns the columns of SCHEMA, each in one chunk, with paths and footers in dictionary encoding. Missing columns get their
    values from `LATER`."""
    length, compacted = len(columns["path"]), Columns()
    for field in SCHEMA:
        values, unknown = columns.pop(field.name, None), LATER.get(field.name)
        if values is None and unknown is not None:
            values = pa.chunked_array([pa.repeat(pa.scalar(unknown, field.type), length)])
        elif values is None:
            raise KeyError(field.name)
        elif unknown is not None and values.null_count:
            values = values.fill_null(pa.scalar(unknown, field.type))
        compacted[field.name] = by_first_use(values) if field.name in SHARED else pa.table({"": values}).combine_chunks()[0]
    return compacted


def ordered(columns: Columns) -> pa.Table:
    """Sorts compact columns by path and row group."""
    order, sorted_columns = _order(columns["path"].combine_chunks(), columns["row_group"].to_numpy()), Columns()
    for name in SCHEMA.names:
        values = columns.pop(name)
        values = values if order is None else values.take(order)
        sorted_columns[name] = by_first_use(values) if name in SHARED and order is not None else values
    return pa.table(sorted_columns)


def _order(paths: pa.DictionaryArray, row_groups: np.ndarray) -> pa.Array | None:
    """Returns the indices of the rows in the manifest's order; None if the rows already have this order."""
    rank = pc.rank(paths.dictionary, tiebreaker="dense").to_numpy().astype(np.int64)
    keys = (rank[paths.indices.to_numpy()] << 32) + row_groups
    return None if (keys[1:] >= keys[:-1]).all() else pa.array(np.argsort(keys, kind="stable"))


def by_first_use(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns a column of strings as one chunk in dictionary encoding. The dictionary has each used value once, in the order of
    the first use."""
    if not pa.types.is_dictionary(column.type):
        return pa.chunked_array([column.combine_chunks().dictionary_encode()])
    whole = column.unify_dictionaries().combine_chunks()
    values = whole.dictionary.dictionary_encode()  # merges equal values
    used = values.indices.take(whole.indices).dictionary_encode()
    return pa.chunked_array([pa.DictionaryArray.from_arrays(used.indices, values.dictionary.take(used.dictionary))])


def digest(chunks: RowGroups, meta: Mapping[str, object]) -> str:
    """Computes the digest of the chunk table and of `meta` without `digest`: 64 hex digits, the same for any Parquet encoding."""
    h = hashlib.sha256(json.dumps({k: v for k, v in meta.items() if k not in ("digest", HUB, ERRORS)}, sort_keys=True).encode())
    for column in SCHEMA:
        if column.name in LATER and all(_unknown(part, LATER[column.name]) for part in _values(chunks, column.name)):
            continue
        for number, part in enumerate(_values(chunks, column.name)):
            if column.type == pa.string():
                h.update(b"\n" * (number > 0))
                h.update(_lines(part.cast(column.type)))
            else:
                h.update(part.to_numpy().astype("<i8", copy=False))
    return h.hexdigest()


def _values(chunks: RowGroups, name: str) -> Iterator[pa.ChunkedArray]:
    """Yields the values of a column, SLICE at a time, with the value for unknown in place of nulls."""
    for part in parts(chunks, [name], SLICE):
        values = part[name]
        yield values.fill_null(LATER[name]) if name in LATER and values.null_count else values


def _unknown(values: pa.ChunkedArray, unknown: int | str) -> bool:
    return bool(pc.all(pc.equal(values, unknown)).as_py())


def _lines(values: pa.ChunkedArray) -> pa.Buffer:
    """Joins strings with line ends, without a Python object for each string. Raises ValueError if a string is missing."""
    if values.null_count:
        raise ValueError("a string is missing")
    whole = values.combine_chunks()
    return pc.binary_join(pa.ListArray.from_arrays(pa.array([0, len(whole)], pa.int32()), whole), "\n")[0].as_buffer()


def encode(chunks: RowGroups, meta: Mapping[str, object], sink: IO[bytes]) -> None:
    """Writes the manifest file: the table with plain strings as Parquet, with `meta` in the schema's metadata. Converts the
    strings of only PARQUET_ROWS rows at a time."""
    schema = SCHEMA.with_metadata({"heliostat": json.dumps(meta)})
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for part in parts(chunks, SCHEMA.names, PARQUET_ROWS):
            writer.write_table(part.cast(schema), row_group_size=PARQUET_ROWS)
            del part  # before the next part is read
