"""Gathers documents for a dataset's shards: without exact duplicates, and, where a pipeline says so, with those that belong
together one after another.

Documents lie in the order of their texts' hashes, which is also the order by which some are held out. Those that belong
together, as the files of a repository, lie in the order of the hash of what they have in common: so they are in one shard and are
held out together. That takes a second shuffle, behind the one by texts that finds exact duplicates.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from heliostat.config.schema import Strict
from heliostat.curation import segment, spill
from heliostat.curation.segment import Run, survivors
from heliostat.storage import Location


class Together(Strict):
    """Describes which documents follow each other; the name of a column alone is its `column`."""

    column: str = Field(min_length=1)
    """Documents with the same value in this column follow each other, as `repository`."""
    order: str | None = Field(None, min_length=1)
    """The column that says in which order, as text; the default is that of their ids, which for repositories are their paths."""

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"column": value} if isinstance(value, str) else value


RUN = pa.schema([*segment.RUN, ("group", pa.binary(32)), ("order", pa.string())])
TOLD = ["hash", "id", "columns", "bytes", "text", "group", "order"]


def regroup(folder: Location, runs: list[Run], low: int, high: int, by: dict[str, Any], explained: bool) -> dict[str, Any]:
    """Spills the documents of a range of keys once more, sorted by what they have in common; exact duplicates are left out."""
    table, duplicates = gather(folder, runs, low, high, True)
    if table is None:
        return {"runs": [], "duplicates": 0, "ends": None, "files": []}
    told = [json.loads(text) if text else {} for text in table["columns"].to_pylist()]
    groups = [group(one.get(by["column"]), digest) for one, digest in zip(told, table["hash"].to_pylist(), strict=True)]
    order = [str(value) if (value := one.get(by["order"])) is not None else "" for one in told]
    keys = np.frombuffer(b"".join(groups), ">u8")[::4].astype(np.uint64)
    held = {name: table[name] for name in table.column_names} | {
        "key": keys,
        "row": range(len(table)),
        "group": groups,
        "order": order,
    }
    again = pa.Table.from_arrays([_array(held[kind.name], kind.type) for kind in RUN], schema=RUN)
    name = spill.write(folder, again, ("group", "order", "id"))
    ends = spill_duplicates(folder, table, duplicates) if explained and duplicates else None
    return {"runs": [[name, len(table), int(table["bytes"].to_numpy().sum())]], "duplicates": sum(len(t) for t in duplicates),
            "ends": ends, "files": [name, *([ends] if ends else [])]}  # fmt: skip


def _array(values: Any, kind: pa.DataType) -> Any:
    return values.cast(kind) if isinstance(values, pa.ChunkedArray) else pa.array(values, kind)


def group(value: Any, digest: bytes) -> bytes:
    """Computes what a document's place follows from: what it has in common with others, or, if nothing, its text's hash."""
    if value is None or value == "":
        return digest
    return hashlib.sha256(f"together\0{value}".encode("utf-8", "surrogatepass")).digest()


def grouped(folder: Location, runs: list[Run], low: int, high: int) -> pa.Table | None:
    """Reads the documents of a range of keys of what `regroup` has spilled, those that belong together one after another."""
    held = [table for run in runs for table in survivors(folder, run, low, high, TOLD)]
    if not held:
        return None
    return pa.concat_tables(held).sort_by([(name, "ascending") for name in ("group", "order", "id")])


def counted(table: pa.Table) -> dict[str, int]:
    """Counts the groups of a shard, and the documents that are in one."""
    apart = table.filter(pc.not_equal(table["group"], table["hash"]))
    return {"groups": pc.count_distinct(apart["group"]).as_py(), "documents": len(apart)}


def unique(table: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Sorts the table by hash and keeps each hash once, with the smallest id; also returns the rows that this removes."""
    table = table.sort_by([("hash", "ascending"), ("id", "ascending")])
    if not len(table):
        return table, table
    hashes = table["hash"].combine_chunks()
    first = np.concatenate(
        [[True], pc.not_equal(hashes.slice(1), hashes.slice(0, len(hashes) - 1)).to_numpy(zero_copy_only=False)]
    )
    return table.filter(pa.array(first)), table.filter(pa.array(~first))


def gather(folder: Location, runs: list[Run], low: int, high: int, columns: bool) -> tuple[pa.Table | None, list[pa.Table]]:
    """Reads the documents of a range of keys, of equal texts the one with the smallest id, and returns the others without texts.

    What it holds is no more than twice the texts that stay, and the duplicates' ids; if `columns`, also those.
    """
    held, kept_bytes, new_bytes = list[pa.Table](), 1 << 24, 0
    told = ["hash", "id", *(["columns"] if columns else [])]
    duplicates = list[pa.Table]()
    for run in runs:
        for table in survivors(folder, run, low, high, [*told, "bytes", "text"]):
            held.append(table)
            new_bytes += table.nbytes
        if new_bytes > kept_bytes:
            table, gone = unique(pa.concat_tables(held))
            duplicates.append(gone.select(told))
            held, kept_bytes, new_bytes = [table], max(1 << 24, table.nbytes), 0
    if not held:
        return None, duplicates
    table, gone = unique(pa.concat_tables(held))
    return table, [*duplicates, gone.select(told)]


def spill_kept(folder: Location, path: str, kept: pa.Table, duplicates: list[pa.Table]) -> str:
    """Spills what became of a shard's documents, and of their exact duplicates."""
    rows = [_end(row, "shard", "kept", path) for row in kept.select(["hash", "id", "columns"]).to_pylist()]
    return _spill_ends(folder, [*rows, *_ends_of_duplicates(kept, duplicates)])


def spill_duplicates(folder: Location, kept: pa.Table, duplicates: list[pa.Table]) -> str:
    """Spills what became of exact duplicates: which document stayed."""
    return _spill_ends(folder, _ends_of_duplicates(kept, duplicates))


def _ends_of_duplicates(kept: pa.Table, duplicates: list[pa.Table]) -> list[dict[str, Any]]:
    stayed = dict(zip(kept["hash"].to_pylist(), kept["id"].to_pylist(), strict=True)) if duplicates else {}
    return [_end(row, "exact", "duplicate", stayed[row["hash"]]) for table in duplicates for row in table.to_pylist()]


def _spill_ends(folder: Location, rows: list[dict[str, Any]]) -> str:
    return spill.write(folder, pa.Table.from_pylist(rows, segment.LEFT_OUT), ("id", "stage", "reason", "detail"))


def _end(row: dict[str, Any], stage: str, reason: str, detail: str) -> dict[str, Any]:
    return {"key": segment.key_of(row["id"]), "id": row["id"], "stage": stage, "reason": reason, "detail": detail,
            "hash": row["hash"].hex(), "columns": row["columns"]}  # fmt: skip
