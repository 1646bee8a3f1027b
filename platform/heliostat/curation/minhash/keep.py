"""Chooses the document that stays in each cluster, and lists the other documents as dropped.

A run is a sorted temporary file of documents. Each task reads a group of runs, and selects one candidate per cluster by the
pipeline's rule. So even a cluster of millions of documents has only one row per group in the final choice. A second task per
group then lists the group's dropped documents. The choice depends on the documents, not on their positions.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pyarrow as pa

from heliostat.curation import segment
from heliostat.curation.comparing import LARGEST, counted
from heliostat.curation.segment import SpilledRun, by_run, of_runs, survivors
from heliostat.storage.locations import Location
from heliostat.tasks import spill

Rule = Literal["longest", "first", "oldest", "best"]
CANDIDATES = pa.schema(
    [("key", pa.uint64()), ("root", pa.uint64()), ("node", pa.uint64()), ("id", pa.large_string()), ("rank", pa.float64()),
     ("value", pa.large_string()), ("size", pa.int64())]
)  # fmt: skip
STARS = pa.schema([("key", pa.uint64()), ("root", pa.uint64())])
BELONGING = pa.schema(
    [*STARS, ("document", pa.uint64()), ("id", pa.large_string()), ("bytes", pa.int64()), ("columns", pa.large_string())]
)
"""Schema of the documents that are in clusters. `key`: the document's node; `document`: its key in the file of documents."""
CHOSEN = pa.schema(
    [("key", pa.uint64()), ("root", pa.uint64()), ("kept", pa.uint64()), ("id", pa.large_string()), ("size", pa.int64())]
)
ABOUT = ["id", "bytes", "columns"]  # columns of a run that the choice of the kept documents needs
ORDER = [(name, "ascending") for name in ("root", "rank", "value", "id", "node")]  # in a cluster, the first stays
HELD = 1 << 16  # minimum candidates in memory before candidates of a cluster are compared


def candidates(folder: Location, first: int, runs: list[SpilledRun], copies: list[str | None], about: list[str | None],
               keep: Rule, column: str, names: list[str]) -> dict[str, object]:  # fmt: skip
    """Chooses each cluster's candidate: the only document in the temporary files `runs` that may stay. Writes the candidates,
    each with the number of the cluster's documents in `runs`, to a temporary file.

    Writes the documents that are in clusters (BELONGING) to further temporary files, so that `decide` reads no other documents.
    `first`: the number of the first of `runs`; `about`: the files that `sign` wrote about their documents.
    """
    waiting, new = [CANDIDATES.empty_table()], 0
    belonging, size, written = list[pa.Table](), 0, list[str]()
    for number, run, rows, roots in _clusters(folder, first, runs, copies, names):
        nodes = (np.uint64(number) << np.uint64(32)) | rows.astype(np.uint64)
        for part, which in _members(folder, run, about[number - first], rows):
            described = [part[name] for name in ("key", *ABOUT)]
            belonging.append(pa.Table.from_arrays([pa.array(nodes[which]), pa.array(roots[which]), *described], schema=BELONGING))
            size += belonging[-1].nbytes
            if size > spill.READ_BYTES:  # columns may be large
                written.append(spill.write(folder, pa.concat_tables(belonging)))
                belonging, size = [], 0
            waiting.append(_compared(part, nodes[which], roots[which], keep, column))
            new += len(part)
        if new >= max(HELD, len(waiting[0])):
            waiting, new = [_best(waiting)], 0
    if belonging:
        written.append(spill.write(folder, pa.concat_tables(belonging)))
    name = spill.write(folder, _best(waiting), ("root", "node"))
    return {"candidates": name, "belonging": written, "files": [name, *written]}


def _clusters(folder: Location, first: int, runs: list[SpilledRun], copies: list[str | None],
              names: list[str]) -> Iterator[tuple[int, SpilledRun, np.ndarray, np.ndarray]]:  # fmt: skip
    """Yields tuples, one per temporary file of documents: the file's number, the file, the rows that are in clusters, and the
    roots of these clusters. The rows include copies: documents with the same keys as an earlier document."""
    stars = dict(by_run(folder, first, len(runs), names))
    for number, (run, name) in enumerate(zip(runs, copies, strict=True), first):
        table = stars.pop(number, STARS.empty_table())
        rows, place = np.unique((table["key"].to_numpy() & np.uint64(0xFFFFFFFF)).astype(np.uint32), return_index=True)
        roots = table["root"].to_numpy()[place]
        if name:
            copied = pa.concat_tables(spill.read(folder, name))
            copy, of = copied["key"].to_numpy().astype(np.uint32), copied["first"].to_numpy()
            alone = np.setdiff1d(of, rows)  # documents that are similar only to copies in the same run
            rows = np.concatenate([rows, alone])
            roots = np.concatenate([roots, (np.uint64(number) << np.uint64(32)) | alone.astype(np.uint64)])
            order = np.argsort(rows)
            rows, roots = rows[order], roots[order]
            rows, roots = np.concatenate([rows, copy]), np.concatenate([roots, roots[np.searchsorted(rows, of)]])
            order = np.argsort(rows)
            rows, roots = rows[order], roots[order]
        yield number, run, rows, roots


def _members(folder: Location, run: SpilledRun, about: str | None, rows: np.ndarray) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Reads the documents with the row numbers `rows` from the file `about`, or from their temporary file without it. Yields
    pairs: a table with the columns ABOUT, and the positions of the table's documents in `rows`. `rows`: row numbers in ascending
    order."""
    if not len(rows):
        return
    for part in spill.read(folder, about) if about else survivors(folder, run, columns=ABOUT):
        part = part.filter(pa.array(np.isin(part["row"].to_numpy(), rows)))
        if len(part):
            yield part, np.searchsorted(rows, part["row"].to_numpy())


def _compared(part: pa.Table, nodes: np.ndarray, roots: np.ndarray, rule: Rule, column: str) -> pa.Table:
    ranks, values = ranked(part, rule, column)
    return pa.Table.from_arrays(
        [pa.array(spill.mixed(roots)), pa.array(roots), pa.array(nodes), part["id"], pa.array(ranks),
         pa.array(values, pa.large_string()), pa.array(np.ones(len(part), np.int64))], schema=CANDIDATES,
    )  # fmt: skip


def _best(tables: list[pa.Table]) -> pa.Table:
    """Returns one candidate per cluster, the first in ORDER, with the total number of the cluster's documents. Empties
    `tables`."""
    table = pa.concat_tables(tables).sort_by(ORDER).combine_chunks()
    tables.clear()
    if not len(table):
        return table
    starts = np.unique(table["root"].to_numpy(), return_index=True)[1]
    sizes = pa.array(np.add.reduceat(table["size"].to_numpy(), starts))
    return table.take(pa.array(starts)).set_column(table.schema.get_field_index("size"), "size", sizes)


def ranked(part: pa.Table, rule: Rule, column: str) -> tuple[np.ndarray, list[str]]:
    """Returns the values that a rule compares, one number and one string per document: an array, and a list. The document with
    the smallest number stays; in a tie, the document with the smallest string."""
    columns = [json.loads(c) if c else {} for c in part["columns"].to_pylist()] if rule in ("oldest", "best") else []
    ranks, values = np.zeros(len(part)), [""] * len(part)
    if rule == "longest":
        ranks = -part["bytes"].to_numpy().astype(np.float64)
    elif rule == "best":
        ranks = np.array([-_number(c.get(column)) for c in columns])
    elif rule == "oldest":
        values = [str(c.get(column) or "\U0010ffff") for c in columns]  # documents without a date come last
    return ranks, values


def _number(value: object) -> float:
    """Returns a column's value as a float; `-inf` for a value that isn't a number."""
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else -math.inf


def choose(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, object]:
    """Chooses the document that stays in each cluster, for the clusters in one of `parts` equal ranges of keys. Writes the choice
    to a temporary file, once per candidate. So the task of each candidate finds the choice."""
    table = spill.joined(folder, names, *spill.share(part, parts), CANDIDATES)
    best = _best([table])
    of = pa.array(np.searchsorted(best["root"].to_numpy(), table["root"].to_numpy()))
    chosen = pa.Table.from_arrays(
        [table["node"], table["root"], best["node"].take(of), best["id"].take(of), best["size"].take(of)], schema=CHOSEN
    )
    name, sizes = spill.write(folder, chosen), best["size"].to_pylist()
    largest = heapq.nsmallest(LARGEST, zip((-size for size in sizes), best["id"].to_pylist(), strict=True))
    return {"chosen": name, "clusters": len(best), "largest": [[-size, id] for size, id in largest],
            "sizes": counted(sizes), "files": [name]}  # fmt: skip


def decide(
    folder: Location, first: int, runs: list[SpilledRun], belonging: list[str], stage: str, names: list[str], every: int = 1
) -> dict[str, object]:
    """Writes the dropped documents of the temporary files `runs`, with the reasons, to new temporary files. Returns a record with
    the names of the new files. Memory holds the ids and columns of few documents at a time."""
    out, files, dropped = segment.Spiller(folder, 1, every), list[str](), list[pa.Table]()
    low, high = first << 32, (first + len(runs)) << 32
    chosen = spill.joined(folder, names, low, high, CHOSEN).sort_by("root").combine_chunks()
    clusters, decided = chosen["root"].to_numpy(), [list[str | int | None]([None, 0, 0]) for _ in runs]
    for table in spill.read_all(folder, belonging):
        nodes = table["key"].to_numpy()
        at = np.searchsorted(clusters, table["root"].to_numpy())
        goes = chosen["kept"].to_numpy()[at] != nodes
        gone, stays = table.filter(pa.array(goes)), chosen.take(pa.array(at[goes]))
        columns = (gone["id"], gone["columns"], stays["id"], stays["size"])
        for id, about, kept, similarity in zip(*(column.to_pylist() for column in columns), strict=True):
            out.leave_out(id, stage, "near_duplicate", f"{kept} (one of {similarity})", columns=about)
        if len(gone):
            dropped.append(gone.select(["key", "document", "bytes"]))
    for number, gone in of_runs(dropped):
        rows = pa.array((gone["key"].to_numpy() & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        name = spill.write(folder, pa.Table.from_arrays([gone["document"], rows], schema=segment.DECIDED), ("row",))
        decided[number - first] = [name, len(gone), int(gone["bytes"].to_numpy().sum())]
        files.append(name)
    record = out.record({})
    return record | {"decided": decided, "files": [*record["files"], *files]}
