"""Finds the exact connected components of a graph of documents, with the edges on disk. Replaces the edges in rounds, until every
component is a star around its smallest node.

A run is a sorted temporary file of documents. A node is a document; the document's run and row give the node's number
(`run << 32 | row`). In a round, each node connects all its neighbors to the smallest node of its neighborhood: the node itself,
or a neighbor. (Hash-to-Min: Rastogi, Machanavajjhala, Chitnis and Das Sarma, Finding Connected Components in Map-Reduce in
Logarithmic Rounds, 2013.) Rare graphs would have more and more edges. Their rounds then alternate between larger neighbors only
and smaller neighbors only, which never adds an edge. (Large star and small star: Kiveris, Lattanzi, Mirrokni, Rastogi and
Vassilvitskii, Connected Components in MapReduce and Beyond, 2014.)

All components are stars when no node with a smaller neighbor has another neighbor. The round that finds this also lists the nodes
with the smallest nodes of their components. In practice, two to five rounds are enough. A task has in memory only the edges of
some of the nodes. It replaces the edges that it writes by those of a spanning forest.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import isqrt
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from heliostat.curation.engine import filled
from heliostat.errors import HeliostatError
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.clusters import CountedTasks
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.merging import MOST_FILES, by_parts
from heliostat.tasks.pool import TaskFunction
from heliostat.tasks.work import key

LEAST_PART, MOST_PART = 1 << 20, 64 << 20  # bytes of the edges' temporary files that a task reads: about a second to a minute
PER_SQUARE = 8 << 10  # bytes per read of a file by a task: reading them takes less time than the store's answer to two requests
ROUNDS = 100  # maximum rounds: more than log^2 of any number of documents
MOST_GROWTH = 2  # edges after a round, relative to those after the first one, above which the next rounds must not add edges
Edges = tuple[np.ndarray, np.ndarray]
Neighbors = Literal["all", "larger", "smaller"]
NONE: Edges = (np.zeros(0, np.uint64), np.zeros(0, np.uint64))


def gathered(flow: Flow, kind: str, signed: list[tuple[str, int]], parts: int, join: TaskFunction) -> list[dict[str, Any]]:
    """Joins temporary files into about `parts` larger files, so that later tasks open fewer files. `join`: the tasks' function
    (`gather` or `meet`); `signed`: the name and the number of rows of each file. Returns the tasks' records.

    The column `node`, the number of the document in the graph, replaces the column `row`.
    """
    share, work, first = -(-sum(rows for _, rows in signed) // parts), list[Task](), 0
    for group in filled(signed, lambda one: one[1], share):
        names = [name for name, _ in group]
        work.append(Task(key(first, names), {"first": first, "names": names}))
        first += len(group)
    return flow.all(kind, join, CountedTasks(iter(work), len(work)))


def gather(folder: Location, first: int, names: list[str]) -> dict[str, object]:
    """Joins the temporary files `names` into one file. Replaces the column `row` by `node`, the number of the document in the
    graph. `first`: the number of the first of these files."""
    tables = list[pa.Table]()
    for run, name in enumerate(names, first):
        for table in spill.read(folder, name):
            node = (np.uint64(run) << np.uint64(32)) | table["row"].to_numpy().astype(np.uint64)
            tables.append(table.set_column(table.schema.get_field_index("row"), "node", pa.array(node)))
    if not tables:  # no run has rows
        return {"gathered": None, "files": []}
    name = spill.write(folder, pa.concat_tables(tables), ("node",))
    return {"gathered": name, "files": [name]}


def meet(folder: Location, first: int, names: list[str]) -> dict[str, object]:
    """Joins the temporary files `names`, like `gather`, but keeps one row per key: the smallest node of the component of the
    nodes that have the key. Writes edges from the other nodes of a component to this node.

    So later tasks read at most one row per key from each joined file, however many documents share the key.
    """
    rows = list[Edges]()
    for run, name in enumerate(names, first):
        for table in spill.read(folder, name):
            rows.append((table["key"].to_numpy(), (np.uint64(run) << np.uint64(32)) | table["row"].to_numpy().astype(np.uint64)))
    if not rows:  # no run has rows
        return {"met": None, "edges_files": [], "edges": 0, "files": []}
    least, edges = _met(_joined(rows))
    name = spill.write_sorted(folder, pa.table({"key": least[0], "node": _through(edges, least[1])}))
    record = _spilled(folder, [edges])
    return record | {"met": name, "files": [name, *record["files"]]}


def _met(rows: Edges) -> tuple[Edges, Edges]:
    """Returns, for rows (keys, nodes): the sorted keys with the smallest node of each, and the forest of the edges from the other
    nodes to this node."""
    least = _smallest(rows)
    return least, forest((rows[1], least[1][np.searchsorted(least[0], rows[0])]))


def pairs(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, object]:
    """Writes edges to a temporary file, in both directions: from each document to the document with the smallest number that is
    connected to it by equal keys. Covers the keys in one of `parts` equal ranges."""
    keys, nodes = spill.arrays(folder, names, *spill.share(part, parts), key=np.uint64, node=np.uint64)
    return _spilled(folder, [_met((keys, nodes))[1]])


def star(folder: Location, part: int, parts: int, names: list[str], room: int, neighbors: Neighbors) -> dict[str, object]:
    """Connects neighbors of each node to the smallest node of the node's neighborhood: `all`, the `larger`, or the `smaller` ones
    and the node itself. Covers the nodes in one of `parts` equal ranges of keys. Writes the new edges to temporary files.

    The record has the number of edges that don't end at their component's smallest node (`unsettled`). If a task finds no such
    edge, it also writes pairs (node, smallest node) to a temporary file (`members`), sorted by node. `room`: edges in memory,
    approximately. A node with more neighbors than this is processed in batches.
    """
    least, batches = _neighborhoods(folder, part, parts, names, room)
    unsettled = 0

    def connected() -> Iterator[Edges]:
        nonlocal unsettled
        for u, v in batches:
            to = _through(least, u)
            unsettled += int(((to < u) & (to != v)).sum())
            some = v > u if neighbors == "larger" else v < u if neighbors == "smaller" else v != to
            also = u[some] if neighbors == "smaller" else NONE[0]
            yield forest((np.concatenate([v[some], also]), np.concatenate([to[some], to[some][: len(also)]])))

    record = _spilled(folder, connected()) | {"unsettled": unsettled, "members": None}
    if not unsettled:
        record["members"] = name = spill.write(folder, pa.table({"key": least[0], "root": least[1]}))
        record["files"].append(name)
    return record


def stars(flow: Flow, kind: str, names: list[str], parts: int, room: int) -> tuple[list[str], int]:
    """Runs rounds until every component is a star, with at most `parts` tasks each. `names`: the temporary files of the edges, in
    both directions; `room`: edges in a task's memory, approximately. Returns the files of pairs (node, smallest node of its
    component), and the number of rounds."""
    neighbors, first = "all", 0
    for rounds in range(1, ROUNDS + 1):
        tasks = by_parts(flow, kind, parts_of(names, parts), names, room=room, neighbors=neighbors)
        records = flow.all(f"{kind}-stars", star, tasks)
        if not any(record["unsettled"] for record in records):
            return [record["members"] for record in records], rounds
        names, edges = edges_of(records), sum(record["edges"] for record in records)
        first = first or edges
        if neighbors != "all" or edges > MOST_GROWTH * first:
            neighbors = "smaller" if neighbors == "larger" else "larger"
    raise HeliostatError(
        f"{kind}: the clusters didn't converge within {ROUNDS} rounds. This is a bug in heliostat. "
        "Report the bug with the pipeline's YAML file"
    )


def parts_of(names: list[str], most: int) -> int:
    """Computes the number of tasks that read edges from these temporary files. Each task writes a file, which all tasks of the
    next step read. So the number grows with the square root of the bytes, up to the number of files that a step reads without
    merging them first, unless a task would read more than MOST_PART bytes."""
    bytes = spill.bytes_of(names)
    fit = min(isqrt(bytes // PER_SQUARE), -(-bytes // LEAST_PART), MOST_FILES)
    return max(1, min(most, max(fit, -(-bytes // MOST_PART))))


def edges_of(records: list[dict[str, Any]]) -> list[str]:
    """Lists the temporary files of edges in the tasks' records."""
    return [name for record in records for name in record["edges_files"]]


def forest(edges: Edges) -> Edges:
    """Replaces edges by those of a spanning forest: from each node to the smallest node of its component."""
    nodes, ends = np.unique(np.concatenate(edges), return_inverse=True)
    one, other = np.split(ends, 2)
    root = np.arange(len(nodes))
    while len(one):
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while (nearer := root[root]).tobytes() != root.tobytes():
            root = nearer
        one, other = root[one], root[other]
        apart = one != other
        one, other = one[apart], other[apart]
    inner = root != np.arange(len(nodes))
    return nodes[inner], nodes[root[inner]]


def _neighborhoods(folder: Location, part: int, parts: int, names: list[str], room: int) -> tuple[Edges, Iterator[Edges]]:
    """Returns the nodes with the smallest node of the neighborhood of each, and all edges in batches of about `room`. Reads the
    edges twice if they are more than one batch. So memory holds a batch, whatever the number of edges."""
    least, first, count = NONE, NONE, 0
    for batch in _batches(folder, part, parts, names, room):
        least = _smallest(_joined([least, (batch[0], np.minimum(*batch))]))
        first, count = batch if not count else NONE, count + 1
    return least, iter([first]) if count < 2 else _batches(folder, part, parts, names, room)


def _batches(folder: Location, part: int, parts: int, names: list[str], room: int) -> Iterator[Edges]:
    waiting, size = list[Edges](), 0
    for table in spill.read_all(folder, names, *spill.share(part, parts)):
        waiting.append((table["u"].to_numpy(), table["v"].to_numpy()))
        size += len(table)
        if size >= room:
            yield _joined(waiting)
            waiting, size = [], 0
    if waiting:
        yield _joined(waiting)


def _joined(rows: list[Edges]) -> Edges:
    firsts, seconds = (np.concatenate([NONE[i], *(row[i] for row in rows)]) for i in range(2))
    return firsts, seconds


def _smallest(rows: Edges) -> Edges:
    """Returns the sorted different values of the first column, and the smallest value in the second column of each."""
    order = np.lexsort((rows[1], rows[0]))
    firsts, seconds = rows[0][order], rows[1][order]
    start = spill.starts(firsts)
    return firsts[start], seconds[start]


def _through(least: Edges, nodes: np.ndarray) -> np.ndarray:
    """Returns the value of each node in sorted pairs (node, value), or the node itself if it is in no pair."""
    if not len(least[0]):
        return nodes
    at = np.minimum(np.searchsorted(least[0], nodes), len(least[0]) - 1)
    return np.where(least[0][at] == nodes, least[1][at], nodes)


def _spilled(folder: Location, batches: Iterable[Edges]) -> dict[str, Any]:
    """Writes each batch of edges to a temporary file, in both directions, and no file for an empty batch."""
    files, edges = list[str](), 0
    for u, v in batches:
        edges += len(u)
        if len(u):
            both = pa.table(
                {"key": spill.mixed(np.concatenate([u, v])), "u": np.concatenate([u, v]), "v": np.concatenate([v, u])}
            )
            files.append(spill.write(folder, both, ("u", "v")))
    return {"edges_files": files, "edges": edges, "files": [*files]}
