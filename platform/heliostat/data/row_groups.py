"""Describes the row groups of a shard as one record, and collects the records of many shards as the manifest's rows.

A record has a list per column, and the values that all row groups of the shard share once. So a row group takes 82 bytes of JSON.
The driver of `heliostat data prepare` holds about 110 bytes per shard, and nothing per row group (docs/benchmarks/curation.md).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import TypedDict

from heliostat.data import manifest, shard
from heliostat.data.manifest_table import LATER
from heliostat.data.stored_rows import SHARD, ColumnFiles, StoredRows
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


EACH = tuple(RowGroupColumns.__annotations__)
FORM: dict[str, Any] = {"compression": "zstd", "use_dictionary": False, "write_page_checksum": True, "write_statistics": False}
SHARDS = 4096  # shards whose values are Python objects


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


def encoded(groups: Sequence[pa.Table], content: str, places: list[int]) -> bytes:
    """Returns row groups as the bytes of a shard. `content`: a digest of all rows, in the footer, which the manifest hashes, so a
    changed row changes the dataset's digest. `places`: the row groups' hold-out positions."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, groups[0].schema, **FORM) as writer:
        for group in groups:
            writer.write_table(group, row_group_size=len(group))
        writer.add_key_value_metadata({"content": content, manifest.PLACES_KEY.decode(): json.dumps(places)})
    return sink.getvalue().to_pybytes()


class ShardCollector:
    """Collects the row groups of shards, in any order of the shards."""

    def __init__(self) -> None:
        self._files = ColumnFiles()
        self._waiting: dict[str, list[Any]] = {name: [] for name in SHARD.names}
        """Values of shards that aren't in `_tables` yet: of at most SHARDS shards."""
        self._tables: list[pa.Table] = []

    def add(self, record: Mapping[str, Any]) -> None:
        """Adds a shard. `record`: has the keys of `ListedShard`. A record of an earlier version has `chunks` instead, the
        manifest's rows of the shard."""
        one = record if "row_groups" in record else cast("Mapping[str, Any]", listed(record["chunks"]))
        columns: Mapping[str, list[Any]] = one["row_groups"]
        of_shard = {**one, "first": self._files.count, "count": len(columns["rows"])}
        self._files.append(columns)
        for name, values in self._waiting.items():
            values.append(of_shard[name])
        if len(self._waiting["path"]) >= SHARDS:
            self._convert()

    def _convert(self) -> None:
        self._tables.append(pa.table(self._waiting, SHARD))
        for values in self._waiting.values():
            values.clear()

    def rows(self) -> StoredRows:
        """Returns the collected rows in the manifest's order."""
        self._convert()
        self._tables = [pa.concat_tables(self._tables).sort_by("path").combine_chunks()]
        return StoredRows(self._files, self._tables[0])
