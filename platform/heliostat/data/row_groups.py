"""Describes the row groups of a shard as one record, and collects the records of many shards as the manifest's table.

A record has a list per column, and the values that all row groups of the shard share once. So a row group takes 82 bytes of JSON.
The driver of `heliostat data prepare` holds about 80 bytes per row group, in Arrow arrays (docs/benchmarks/curation.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
from typing_extensions import TypedDict

from heliostat.data import manifest, shard
from heliostat.data.manifest_table import LATER, SCHEMA, SHARED, SLICE, Columns, compact, ordered
from heliostat.storage.locations import Location


class RowGroupColumns(TypedDict):
    """Lists values of a shard's row groups, in the order of the row groups: columns of `manifest_table.SCHEMA`."""

    rows: list[int]
    tokens: list[int]
    bytes: list[int]
    place: list[int]
    content: list[str]


class ListedShard(TypedDict):
    """Describes a shard as the manifest lists it: the path and size of its file, its footer's digest, and its row groups."""

    path: str
    file_bytes: int
    footer: str
    row_groups: RowGroupColumns


OF_SHARD = ("path", "footer", "file_bytes")
EACH = tuple(RowGroupColumns.__annotations__)
COUNT = "count"  # number of row groups of a shard


def listed(rows: Sequence[Mapping[str, Any]]) -> ListedShard:
    """Converts the manifest's rows of one shard, at least one row, to a record."""
    columns: Any = {name: [row.get(name, LATER.get(name)) for row in rows] for name in EACH}
    first = rows[0]
    return {"path": first["path"], "file_bytes": first["file_bytes"], "footer": first["footer"], "row_groups": columns}


def written(location: Location, path: str, data: bytes, column: str | None) -> ListedShard:
    """Describes a shard that is stored at `path`. `data`: the complete file; `column`: the column that training reads, None for
    all columns."""
    rows, contents = manifest.read_footer(location, path, column), shard.content_digests(data, column)
    return listed([{**row, "content": content} for row, content in zip(rows, contents, strict=True)])


class ShardCollector:
    """Collects the row groups of shards, in any order of the shards."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Any]] = {name: [] for name in (*OF_SHARD, COUNT, *EACH)}
        """Values that aren't in `_arrays` yet: of at most SLICE row groups, and one shard."""
        self._arrays: dict[str, list[pa.Array]] = {name: [] for name in self._waiting}

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a shard. `record`: has the keys of `ListedShard`. A record of an earlier version has `chunks` instead, the
        manifest's rows of the shard."""
        one = record if "row_groups" in record else cast("Mapping[str, Any]", listed(record["chunks"]))
        columns: Mapping[str, list[Any]] = one["row_groups"]
        for name in OF_SHARD:
            self._waiting[name].append(one[name])
        self._waiting[COUNT].append(len(columns["rows"]))
        for name in EACH:
            self._waiting[name] += columns[name]
        if len(self._waiting["rows"]) >= SLICE:
            self._convert()

    def _convert(self) -> None:
        for name, values in self._waiting.items():
            self._arrays[name].append(pa.array(values, pa.int64() if name == COUNT else SCHEMA.field(name).type))
            values.clear()

    def table(self) -> pa.Table:
        """Returns the rows in the manifest's order. Call this once, because it frees each collected column."""
        self._convert()
        counts = pa.concat_arrays(self._arrays.pop(COUNT)).to_numpy()
        shards = pa.array(np.repeat(np.arange(len(counts), dtype=np.int32), counts))
        firsts = np.repeat(np.cumsum(counts) - counts, counts)
        columns: Columns = {"row_group": pa.chunked_array([(np.arange(len(firsts)) - firsts).astype(np.int32)])}
        del firsts
        for name in OF_SHARD:
            values = pa.concat_arrays(self._arrays.pop(name))
            shared = pa.DictionaryArray.from_arrays(shards, values) if name in SHARED else values.take(shards)
            columns[name] = pa.chunked_array([shared])
        for name in EACH:
            columns[name] = pa.chunked_array(self._arrays.pop(name))
        return ordered(compact(columns))
