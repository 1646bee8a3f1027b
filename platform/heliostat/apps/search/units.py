"""Divides a prepared text dataset into units of work, and reads a unit's documents from its shard."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from itertools import pairwise
from typing import TypedDict, cast

import numpy as np
import pyarrow as pa

from heliostat.data import manifest, shard
from heliostat.data.manifest import Manifest
from heliostat.data.manifest_table import SLICE
from heliostat.errors import ConfigError, DataError
from heliostat.storage.locations import Location
from heliostat.text import brief


@dataclass(frozen=True)
class RowGroup:
    """Describes a row group of a shard, as the manifest lists it."""

    number: int
    content: str


class RowGroupRow(TypedDict):
    """Holds the columns that units need from the manifest's table of row groups."""

    path: str
    row_group: int
    footer: str
    content: str
    place: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class IndexUnit:
    """Describes a unit: row groups of one shard that contain only complete documents."""

    path: str
    footer: str
    groups: tuple[RowGroup, ...]
    bytes: int

    @property
    def identity(self) -> list[object]:
        """Returns, as JSON, the values that determine the unit's passages."""
        return [self.path, self.footer, [astuple(group) for group in self.groups]]


@dataclass(frozen=True)
class DocumentTokens:
    """Holds a document's token ids, and the row group in which the document begins."""

    id: str
    row_group: int
    tokens: np.ndarray


def open_text(place: Location) -> Manifest:
    """Opens a prepared dataset; raises ConfigError if it contains no text."""
    prepared = manifest.read(place)
    if prepared.kind != "tokens":
        raise ConfigError(
            f"{place}: contains {prepared.kind!r}, not text. `heliostat search index` needs a dataset of a text pipeline"
        )
    return prepared


def units(prepared: Manifest, target: int) -> Iterator[IndexUnit]:
    """Yields the dataset's units, of about `target` tokens, in the dataset's order.

    Row groups that share a document have the same `place` in the manifest, and are in the same unit. If a shard's `place` values
    are unknown, all row groups of the shard are in the same unit.
    """
    batches = prepared.chunks.select(list(RowGroupRow.__annotations__)).to_batches(max_chunksize=SLICE)
    waiting, tokens = list[RowGroupRow](), 0
    for row in (cast("RowGroupRow", row) for batch in batches for row in batch.to_pylist()):
        other = waiting and row["path"] != waiting[-1]["path"]
        if waiting and (other or (tokens >= target and row["place"] != waiting[-1]["place"] and row["place"] >= 0)):
            yield _unit(waiting)
            waiting, tokens = [], 0
        waiting.append(row)
        tokens += row["tokens"]
    if waiting:
        yield _unit(waiting)


def _unit(rows: list[RowGroupRow]) -> IndexUnit:
    groups = tuple(RowGroup(row["row_group"], row["content"]) for row in rows)
    return IndexUnit(rows[0]["path"], rows[0]["footer"], groups, sum(row["bytes"] for row in rows))


def documents(dataset: Location, unit: IndexUnit, end: int | None) -> Iterator[DocumentTokens]:
    """Yields the documents of a unit. Joins each document from its rows.

    A document ends before the token `end`. If `end` is None, the document ends where the document id changes.
    """
    waiting, id, at = list[np.ndarray](), "", -1
    for group in unit.groups:
        for name, row in _rows(dataset.join(unit.path), group, unit.footer):
            if waiting and name != id:
                yield _document(id, at, waiting, end)
                waiting = []
            id, at = name, at if waiting else group.number
            waiting.append(row)
            if end is not None and len(row) and row[-1] == end:
                yield _document(id, at, waiting, end)
                waiting = []
    if waiting:
        yield _document(id, at, waiting, end)


def _document(id: str, at: int, rows: list[np.ndarray], end: int | None) -> DocumentTokens:
    tokens = np.concatenate(rows)
    return DocumentTokens(id, at, tokens[:-1] if end is not None and len(tokens) and tokens[-1] == end else tokens)


def _rows(place: Location, group: RowGroup, footer: str) -> list[tuple[str, np.ndarray]]:
    """Reads a row group as (document id, token ids), and checks the row group against the manifest's digests. Raises DataError
    if the row group is damaged."""

    def get() -> tuple[pa.Table, pa.Table]:
        with place.fs.open_input_file(place.path) as file:
            names = shard.read_group(file, group.number, "document", footer, "")
            return names, shard.read_group(file, group.number, "tokens", footer, group.content)

    try:
        names, tokens = place.attempt(get)
    except FileNotFoundError as e:
        raise DataError(f"{place}: the shard is missing. Restore it, or prepare the dataset again") from e
    except (pa.ArrowException, OSError, KeyError, ValueError) as e:
        fault = f"{place}: can't read the tokens and document ids of row group {group.number} ({brief(e)})"
        raise DataError(f"{fault}. Prepare the dataset again") from e
    lists = tokens["tokens"].combine_chunks()
    flat, offsets = lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy()
    rows = [flat[a:b] for a, b in pairwise(offsets.tolist())]
    return list(zip(names["document"].to_pylist(), rows, strict=True))
