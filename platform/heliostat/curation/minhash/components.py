"""Finds the exact connected components of a graph of documents, with the edges on disk. Alternates two operations on the edges:
large star and small star.

(Kiveris, Lattanzi, Mirrokni, Rastogi and Vassilvitskii, Connected Components in MapReduce and Beyond, 2014.) A run is a sorted
temporary file of documents. A node is a document; the document's run and row give the node's number (`run << 32 | row`). A large
star connects every larger neighbor of a node to the smallest node in the node's neighborhood. A small star connects every smaller
neighbor, and the node itself, to this smallest node. When neither operation changes an edge, every component is a star around its
smallest node. This takes O(log^2 n) rounds; in practice, only a few. In each round, a task has in memory only the edges of some
of the nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import isqrt
from typing import Any

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
Edges = tuple[np.ndarray, np.ndarray]
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
    """Joins the temporary files `names`, like `gather`, but keeps one row per key: the row of the smallest node. Writes edges
    from the other nodes of a key to this node.

    So later tasks read at most one row per key from each joined file, however many documents share the key.
    """
    rows = list[Edges]()
    for run, name in enumerate(names, first):
        for table in spill.read(folder, name):
            rows.append((table["key"].to_numpy(), (np.uint64(run) << np.uint64(32)) | table["row"].to_numpy().astype(np.uint64)))
    if not rows:  # no run has rows
        return {"met": None, "edges_files": [], "files": []}
    least, edges = _met(_joined(rows))
    name = spill.write_sorted(folder, pa.table({"key": least[0], "node": least[1]}))
    record = _spilled(folder, [edges], both=True)
    return record | {"met": name, "files": [name, *record["files"]]}


def _met(rows: Edges) -> tuple[Edges, Edges]:
    """Returns, for rows (keys, nodes): the sorted keys with the smallest node of each, and edges from the other nodes to this
    node."""
    least = _smallest(rows)
    return least, unique((rows[1], least[1][np.searchsorted(least[0], rows[0])]))


def pairs(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, object]:
    """Writes edges to a temporary file, in both directions: from each document to the document with the smallest number that has
    the same key. Covers the keys in one of `parts` equal ranges."""
    keys, nodes = spill.arrays(folder, names, *spill.share(part, parts), key=np.uint64, node=np.uint64)
    return _spilled(folder, [_met((keys, nodes))[1]], both=True)


def large_star(folder: Location, part: int, parts: int, names: list[str], room: int) -> dict[str, object]:
    """Connects the larger neighbors of each node to the smallest node in the node's neighborhood. Covers the nodes in one of
    `parts` equal ranges of keys. Returns a record with the temporary files of the new edges, and with the number and a checksum
    of the nodes that have a smaller neighbor. These two values show whether a round changed any edge.

    `room`: edges in memory, approximately. A node with more neighbors than this is processed in batches.
    """
    least, batches = _neighbors(folder, part, parts, names, room)
    with np.errstate(over="ignore"):
        check = int(spill.mixed(spill.mixed(least[0]) + least[1]).sum(dtype=np.uint64))
    connected = (unique((v[v > u], _through(least, u[v > u]))) for u, v in batches)
    return _spilled(folder, connected, both=False) | {"check": str(check), "edges": len(least[0])}


def small_star(folder: Location, part: int, parts: int, names: list[str], room: int) -> dict[str, object]:
    """Connects each node, and the node's smaller neighbors, to the smallest of these neighbors. Covers the nodes in one of
    `parts` equal ranges of keys. Writes the new edges to temporary files. `room`: edges in memory, approximately."""
    least, batches = _neighbors(folder, part, parts, names, room)
    smallest = ((edges, _through(least, edges[0])) for edges in batches)
    connected = (unique((np.concatenate(edges), np.concatenate([to, to]))) for edges, to in smallest)
    return _spilled(folder, connected, both=True)


def stars(flow: Flow, kind: str, names: list[str], parts: int, room: int) -> tuple[list[str], int]:
    """Runs rounds of large star and small star until no edge changes, with at most `parts` tasks each. `room`: edges in a task's
    memory, approximately. Returns the temporary files of the edges, which then form stars, and the number of rounds."""
    before: tuple[int, int] | None = None
    for rounds in range(ROUNDS):
        large = flow.all(f"{kind}-large", large_star, by_parts(flow, kind, parts_of(names, parts), names, room=room))
        now = (sum(r["edges"] for r in large), sum(int(r["check"]) for r in large) % (1 << 64))
        if now == before:
            return names, rounds
        names = edges_of(large)
        small = flow.all(f"{kind}-small", small_star, by_parts(flow, kind, parts_of(names, parts), names, room=room))
        before, names = now, edges_of(small)
    raise HeliostatError(
        f"{kind}: the clusters didn't converge within {ROUNDS} rounds. This is a bug in heliostat. "
        "Report the bug with the pipeline's YAML file"
    )


def parts_of(names: list[str], most: int) -> int:
    """Computes the number of tasks that read edges from these temporary files. Each task writes a file, which all tasks of the
    next step read. So the number grows with the square root of the bytes, up to the number of files that a step reads without
    merging them first, unless a task would read more than MOST_PART bytes."""
    bytes = sum(spill.size_of(name) or 0 for name in names)
    fit = min(isqrt(bytes // PER_SQUARE), -(-bytes // LEAST_PART), MOST_FILES)
    return max(1, min(most, max(fit, -(-bytes // MOST_PART))))


def edges_of(records: list[dict[str, Any]]) -> list[str]:
    """Lists the temporary files of edges in the tasks' records."""
    return [name for record in records for name in record["edges_files"]]


def unique(edges: Edges) -> Edges:
    """Sorts edges. Removes repeated edges, and edges from a node to itself."""
    u, v = (e[edges[0] != edges[1]] for e in edges)
    order = np.lexsort((v, u))
    u, v = u[order], v[order]
    first = spill.starts(u, v)
    return u[first], v[first]


def _neighbors(folder: Location, part: int, parts: int, names: list[str], room: int) -> tuple[Edges, Iterator[Edges]]:
    """Returns the nodes that have a smaller neighbor, with the smallest neighbor of each, and all edges in batches of about
    `room`. Reads the edges twice if they are more than one batch. So memory holds a batch, whatever the number of edges."""
    least, first, count = NONE, NONE, 0
    for batch in _batches(folder, part, parts, names, room):
        down = batch[0] > batch[1]
        least = _smallest(_joined([least, (batch[0][down], batch[1][down])]))
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
    """Returns the smallest neighbor of each node, or the node itself if it has no smaller neighbor."""
    if not len(least[0]):
        return nodes
    at = np.minimum(np.searchsorted(least[0], nodes), len(least[0]) - 1)
    return np.where(least[0][at] == nodes, least[1][at], nodes)


def _spilled(folder: Location, batches: Iterable[Edges], both: bool) -> dict[str, Any]:
    """Writes each batch of edges to a temporary file, and no file for an empty batch. With `both`, in both directions."""
    files = list[str]()
    for u, v in batches:
        if len(u):
            u, v = unique((np.concatenate([u, v]), np.concatenate([v, u]))) if both else (u, v)
            files.append(spill.write(folder, pa.table({"key": spill.mixed(u), "u": u, "v": v}), ("u", "v")))
    return {"edges_files": files, "files": files}
