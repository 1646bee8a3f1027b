"""Finds the documents of several runs that have the same text, so that only one of them is signed.

A run is a temporary file of documents, sorted by the hash of their texts. Each run lists its different texts (`identify`). A task
per range of hashes finds the texts that several runs have (`repeated`). The first document of a text represents the text, and the
others are copies. Each run then gets the rows of its own representatives and copies (`copies`). Two texts are the same if 128
bits of their SHA-256 are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import xxhash

from heliostat.curation.segment import SpilledRun, by_run, survivors
from heliostat.storage.locations import Location
from heliostat.tasks import spill

ROW_BYTES = 120  # bytes of memory per different text of a run in a task, including the sort


def within_of(table: pa.Table, within: str) -> np.ndarray:
    """Returns a hash of each document's value in the column `within`, uint64 [documents]."""
    values = (json.dumps(json.loads(columns or "{}").get(within), sort_keys=True) for columns in table["columns"].to_pylist())
    return np.fromiter((xxhash.xxh64_intdigest(value.encode()) for value in values), np.uint64, len(table))


def with_first(tables: Iterator[pa.Table], within: str) -> Iterator[tuple[pa.Table, np.ndarray, np.ndarray]]:
    """Yields each table of a run's documents with 128 bits that identify each document's text, uint64 [documents, 2], and the
    run's first row that has this text, uint32 [documents]. `tables`: in the order of the run, with the columns `hash` and, with
    `within`, `columns`.

    With `within`, the same text with another value in this column is another text. Equal texts have equal keys, so the texts of
    only one key are remembered from one table to the next.
    """
    key, row, identity = np.zeros(0, np.uint64), np.zeros(0, np.uint32), np.zeros((0, 2), np.uint64)
    for table in tables:
        if not len(table):
            continue
        text = np.frombuffer(b"".join(table["hash"].to_pylist()), ">u8").astype(np.uint64).reshape(-1, 4)[:, :2]
        text = text ^ within_of(table, within)[:, None] if within else text
        key, row = np.concatenate([key, table["key"].to_numpy()]), np.concatenate([row, table["row"].to_numpy()])
        identity = np.concatenate([identity, text])
        order = np.lexsort((row, identity[:, 1], identity[:, 0]))
        starts = np.flatnonzero(spill.starts(*identity[order].T))
        first = np.empty_like(row)
        first[order] = np.repeat(row[order[starts]], np.diff(starts, append=len(row)))
        yield table, text, first[-len(table) :]
        last = (key == key[-1]) & (first == row)
        key, row, identity = key[last], row[last], identity[last]


def identify(folder: Location, first: int, runs: list[SpilledRun], within: str) -> dict[str, object]:
    """Writes the different texts of each of `runs` to one temporary file, each with the number of its run's first document in the
    graph. `first`: the number of the first of `runs` among all runs."""
    nodes, texts = [np.zeros(0, np.uint64)], [np.zeros((0, 2), np.uint64)]
    for number, run in enumerate(runs, first):
        tables = survivors(folder, run, columns=["hash", *(["columns"] if within else [])])
        for table, identity, first_rows in with_first(tables, within):
            own = first_rows == table["row"].to_numpy()
            nodes.append((np.uint64(number) << np.uint64(32)) | first_rows[own].astype(np.uint64))
            texts.append(identity[own])
    node, text = np.concatenate(nodes), np.concatenate(texts)
    name = spill.write(folder, pa.table({"key": text[:, 0], "rest": text[:, 1], "node": node}), ("rest", "node"))
    return {"texts": name, "rows": len(node), "files": [name]}


def repeated(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, object]:
    """Writes the documents whose text several runs have to a temporary file, sorted by their numbers in the graph. Covers the
    texts in one of `parts` equal ranges. Each row has a key that all documents of the text share, and whether the document is a
    copy."""
    keys, rest, nodes = spill.arrays(folder, names, *spill.share(part, parts), key=np.uint64, rest=np.uint64, node=np.uint64)
    order = np.lexsort((nodes, rest, keys))
    keys, rest, nodes = keys[order], rest[order], nodes[order]
    new = spill.starts(keys, rest)
    sizes = np.diff(np.flatnonzero(new), append=len(new))
    several = np.repeat(sizes > 1, sizes)
    text = spill.mixed(keys ^ spill.mixed(rest))[several]
    name = spill.write(folder, pa.table({"key": nodes[several], "text": text, "copy": ~new[several]}))
    return {"repeated": name, "rows": int(several.sum()), "files": [name]}


def copies(folder: Location, first: int, runs: list[SpilledRun], names: list[str]) -> dict[str, object]:
    """Writes the rows of `repeated` for each of `runs` to a temporary file of its own. Lists the names of the files, and None for
    a run that shares no text with another run. The content doesn't depend on the number of the run, so a task that reads this
    file doesn't run again if another input comes before the run. `first`: the number of the first of `runs`."""
    files: list[str | None] = [None] * len(runs)
    for number, table in by_run(folder, first, len(runs), names):
        row = pa.array(table["key"].to_numpy() & np.uint64(0xFFFFFFFF))
        files[number - first] = spill.write_sorted(folder, table.set_column(0, "key", row))
    return {"copies": files, "files": [name for name in files if name]}


def read(folder: Location, name: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads a file of `copies`. Returns rows, uint32 [documents], their keys, uint64, and whether each is a copy, bool. All are
    empty without a file."""
    rows, texts, copy = spill.arrays(folder, [name] if name else [], 0, spill.ALL, key=np.uint64, text=np.uint64, copy=np.bool_)
    return rows.astype(np.uint32), texts, copy
