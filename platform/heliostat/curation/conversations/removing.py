"""Removes a conversation or a preference from a shard, and from the counts of its dataset."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from heliostat.curation.conversations import making
from heliostat.data import documents
from heliostat.data.conversations import ConversationFacts
from heliostat.data.documents import IDS
from heliostat.data.manifest import PLACES_KEY


def without(file: pq.ParquetFile, id: str) -> tuple[bytes | None, int]:
    """Rewrites an open shard without a document. Returns two values: the new file (None if it is empty), and the number of
    removed rows.

    No other document moves: packs become shorter, and empty packs are removed. Row groups keep their hold-out positions.
    """
    places, groups, kept, removed = json.loads(file.metadata.metadata[PLACES_KEY]), list[pa.Table](), list[int](), 0
    for group, place in enumerate(places):
        table = file.read_row_group(group)
        left = _without(table, id)
        removed += len(table) - len(left)
        if len(left):
            groups.append(left)
            kept.append(place)
    return making.encoded(groups, kept) if groups else None, removed


def _without(table: pa.Table, id: str) -> pa.Table:
    column = IDS if IDS in table.column_names else "id"
    if not len(rows := documents.rows_of(table[column], id)):
        return table
    changed = {row: _shorter(table.slice(row, 1).to_pylist()[0], id) for row in rows.tolist()} if column == IDS else {}
    schema = table.schema.remove_metadata()
    parts = list[pa.Table]()
    for before, row in pairwise([-1, *rows.tolist(), len(table)]):
        parts.append(table.slice(before + 1, row - before - 1))
        if (pack := changed.get(row)) and pack[IDS]:
            parts.append(pa.Table.from_pylist([pack], schema=schema))
    return pa.concat_tables(part.replace_schema_metadata() for part in parts).combine_chunks()


def _shorter(pack: dict[str, Any], id: str) -> dict[str, Any]:
    """Returns a pack, a row of PACKS, without a document."""
    ends = np.cumsum(pack["lengths"]).tolist()
    kept = [(one, length, end) for one, length, end in zip(pack[IDS], pack["lengths"], ends, strict=True) if one != id]
    spans = [slice(end - length, end) for _, length, end in kept]
    values = {name: [value for span in spans for value in pack[name][span]] for name in ("tokens", "trained")}
    return {IDS: [one for one, _, _ in kept], "lengths": [length for _, length, _ in kept], **values}


def counts(facts: ConversationFacts, removed: Mapping[str, int]) -> dict[str, int]:
    """Returns the counts of a dataset without a document. `removed`: the counts of the document, and of the removed `rows`."""
    left = {name: count - removed.get(name, 0) for name, count in facts["counts"].items()}
    if facts["form"] == "packs":
        left["padding"] += removed["tokens"] - removed.get("rows", 0) * facts["sequence_length"]
    return left
