"""Chooses who of each cluster stays, and tells every run which of its documents do not.

The stars of `components` are joined with what the rule compares (read from the runs), grouped by cluster, and the decisions
sorted back to the runs: three passes over the members of clusters alone. The choice follows from the documents, not from where
they lie.
"""

from __future__ import annotations

import heapq
import json
import math
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from heliostat.curation import segment, spill
from heliostat.curation.comparing import LARGEST, counted
from heliostat.curation.segment import Run, by_run, survivors
from heliostat.storage import Location

Rule = Literal["longest", "first", "oldest", "best"]
MEMBERS = pa.schema(
    [("key", pa.uint64()), ("root", pa.uint64()), ("node", pa.uint64()), ("doc", pa.uint64()), ("id", pa.large_string()),
     ("bytes", pa.int64()), ("rank", pa.float64()), ("value", pa.large_string()), ("columns", pa.large_string())]
)  # fmt: skip
CHOSEN = pa.schema(
    [("key", pa.uint64()), ("doc", pa.uint64()), ("id", pa.large_string()), ("bytes", pa.int64()), ("kept", pa.large_string()),
     ("size", pa.int64()), ("columns", pa.large_string())]
)  # fmt: skip


def members(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, Any]:
    """Spills (node, root of its star) by node, the roots with themselves."""
    nodes, roots = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for name in names:
        for table in spill.read(folder, name, *spill.share(part, parts)):
            u, v = table["u"].to_numpy(), table["v"].to_numpy()
            centre = np.unique(u[u < v])
            nodes += [u[u > v], centre]
            roots += [v[u > v], centre]
    table = pa.table({"key": np.concatenate(nodes), "root": np.concatenate(roots)})
    name = spill.write(folder, table.group_by(["key", "root"], use_threads=False).aggregate([]), ("root",))
    return {"members": name, "rows": len(table), "files": [name]}


def attributes(folder: Location, first: int, runs: list[Run], rule: Rule, column: str, names: list[str]) -> dict[str, Any]:
    """Spills what the rule compares of the members of clusters in some runs, of which the first has the number `first`."""
    found = []
    for number, table in by_run(folder, first, len(runs), names):
        nodes, places = np.unique(table["key"].to_numpy(), return_index=True)
        roots, rows = table["root"].to_numpy()[places], (nodes & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        for part in survivors(folder, runs[number - first], columns=["id", "bytes", "columns"]):
            here = np.flatnonzero(np.isin(part["row"].to_numpy(), rows))
            if len(here):
                part = part.take(pa.array(here))
                which = np.searchsorted(rows, part["row"].to_numpy())
                found.append(_compared(part, nodes[which], roots[which], rule, column))
    table = pa.concat_tables(found) if found else MEMBERS.empty_table()
    name = spill.write(folder, table, ("root", "node"))
    return {"attributes": name, "files": [name]}


def _compared(part: pa.Table, nodes: np.ndarray, roots: np.ndarray, rule: Rule, column: str) -> pa.Table:
    ranks, values = ranked(part, rule, column)
    return pa.Table.from_arrays(
        [pa.array(spill.mixed(roots)), pa.array(roots), pa.array(nodes), part["key"], part["id"], part["bytes"], pa.array(ranks),
         pa.array(values, pa.large_string()), part["columns"]], schema=MEMBERS,
    )  # fmt: skip


def ranked(part: pa.Table, rule: Rule, column: str) -> tuple[np.ndarray, list[str]]:
    """Returns what a rule compares of documents with `bytes` and `columns`: numbers, then strings; who has the least stays."""
    columns = [json.loads(c) if c else {} for c in part["columns"].to_pylist()] if rule in ("oldest", "best") else []
    ranks, values = np.zeros(len(part)), [""] * len(part)
    if rule == "longest":
        ranks = -part["bytes"].to_numpy().astype(np.float64)
    elif rule == "best":
        ranks = np.array([-_number(c.get(column)) for c in columns])
    elif rule == "oldest":
        values = [str(c.get(column) or "\U0010ffff") for c in columns]  # those without a date come last
    return ranks, values


def _number(value: Any) -> float:
    """Returns a column's value as a number, the least there is if it is none."""
    return float(value) if isinstance(value, int | float) and not math.isnan(value) else -math.inf


def choose(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, Any]:
    """Chooses who stays of the clusters in this part, and spills the others by node, with who was kept."""
    held = [t for name in names for t in spill.read(folder, name, *spill.share(part, parts))]
    order = [(name, "ascending") for name in ("root", "rank", "value", "id", "node")]
    table = pa.concat_tables([MEMBERS.empty_table(), *held]).sort_by(order)
    starts, counts = np.unique(table["root"].to_numpy(), return_index=True, return_counts=True)[1:]
    kept = np.repeat(starts, counts)
    others = pa.array(np.flatnonzero(kept != np.arange(len(table))))
    chosen = pa.Table.from_arrays(
        [table["node"], table["doc"], table["id"], table["bytes"], table["id"].take(pa.array(kept)),
         pa.array(np.repeat(counts, counts)), table["columns"]], schema=CHOSEN,
    ).take(others)  # fmt: skip
    name = spill.write(folder, chosen)
    largest = heapq.nsmallest(LARGEST, zip((-counts).tolist(), table["id"].take(pa.array(starts)).to_pylist(), strict=True))
    return {"chosen": name, "clusters": len(starts), "largest": [[-size, id] for size, id in largest],
            "sizes": counted(counts.tolist()), "files": [name]}  # fmt: skip


def decide(folder: Location, first: int, runs: list[Run], stage: str, names: list[str]) -> dict[str, Any]:
    """Spills for each of some runs which of its documents go, and tells why."""
    out, files = segment.Spiller(folder, 1), list[str]()
    decided: list[list[Any]] = [[None, 0, 0] for _ in runs]
    for number, table in by_run(folder, first, len(runs), names):
        for row in table.to_pylist():
            out.leave_out(row["id"], stage, "near_duplicate", f"{row['kept']} (one of {row['size']})",
                          columns=row["columns"])  # fmt: skip
        rows = (table["key"].to_numpy() & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        name = spill.write(folder, pa.Table.from_arrays([table["doc"], pa.array(rows)], schema=segment.DECIDED), ("row",))
        decided[number - first] = [name, len(table), int(table["bytes"].to_numpy().sum())]
        files.append(name)
    record = out.record({})
    return record | {"decided": decided, "files": [*record["files"], *files]}
