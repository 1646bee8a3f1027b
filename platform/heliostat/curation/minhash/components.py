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

import numpy as np
import pyarrow as pa

from heliostat.curation.engine import filled
from heliostat.errors import HeliostatError
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.merging import by_parts
from heliostat.tasks.work import key

ROUNDS = 100  # maximum rounds: more than log^2 of any number of documents
Edges = tuple[np.ndarray, np.ndarray]


def gathered(flow: Flow, kind: str, signed: list[tuple[str, int]], parts: int) -> list[str]:
    """Joins temporary files into about `parts` larger files, so that later tasks open fewer files. `signed`: the name and the
    number of rows of each file. Returns the names of the larger files.

    The column `node`, the number of the document in the graph, replaces the column `row`.
    """
    share, work, first = -(-sum(rows for _, rows in signed) // parts), list[Task](), 0
    for group in filled(signed, lambda one: one[1], share):
        names = [name for name, _ in group]
        work.append(Task(key(first, names), {"first": first, "names": names}))
        first += len(group)
    return [r["gathered"] for r in flow.all(f"{kind}-gather", gather, iter(work)) if r["gathered"]]


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


def pairs(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, object]:
    """Writes edges to a temporary file, in both directions: from each document to the document with the smallest number that has
    the same key. Covers the keys in one of `parts` equal ranges."""
    keys, nodes = spill.arrays(folder, names, *spill.share(part, parts), key=np.uint64, node=np.uint64)
    order = np.lexsort((nodes, keys))
    keys, nodes = keys[order], nodes[order]
    least = nodes[_starts(keys)] if len(keys) else nodes
    return _spilled(folder, unique((nodes, least)), both=True)


def large_star(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, object]:
    """Connects the larger neighbors of each node to the smallest node in the node's neighborhood. Covers the nodes in one of
    `parts` equal ranges of keys. Returns a record with the temporary file of the new edges, and with a checksum of the old edges.
    The checksum shows whether a round changed any edge."""
    u, v = edges = _edges(folder, part, parts, names)
    down = u > v
    with np.errstate(over="ignore"):
        check = int(spill.mixed(spill.mixed(u[down]) + v[down]).sum(dtype=np.uint64))
    least = np.minimum(u, _least(edges))
    up = v > u
    return _spilled(folder, unique((v[up], least[up])), both=False) | {"check": str(check), "edges": int(down.sum())}


def small_star(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, object]:
    """Connects each node, and the node's smaller neighbors, to the smallest of these neighbors. Covers the nodes in one of
    `parts` equal ranges of keys. Writes the new edges to a temporary file."""
    u, v = edges = _edges(folder, part, parts, names)
    least = _least(edges)
    return _spilled(folder, unique((np.concatenate([u, v]), np.concatenate([least, least]))), both=True)


def stars(flow: Flow, kind: str, names: list[str], parts: int) -> tuple[list[str], int]:
    """Runs rounds of large star and small star until no edge changes. Returns the temporary files of the edges, which then form
    stars, and the number of rounds."""
    before: tuple[int, int] | None = None
    for rounds in range(ROUNDS):
        large = flow.all(f"{kind}-large", large_star, by_parts(flow, kind, parts, names))
        now = (sum(r["edges"] for r in large), sum(int(r["check"]) for r in large) % (1 << 64))
        if now == before:
            return names, rounds
        small = flow.all(f"{kind}-small", small_star, by_parts(flow, kind, parts, [r["edges_file"] for r in large]))
        before, names = now, [r["edges_file"] for r in small]
    raise HeliostatError(
        f"{kind}: the clusters didn't converge within {ROUNDS} rounds. This is a bug in heliostat. "
        "Report the bug with the pipeline's YAML file"
    )


def unique(edges: Edges) -> Edges:
    """Sorts edges. Removes repeated edges, and edges from a node to itself."""
    u, v = (e[edges[0] != edges[1]] for e in edges)
    order = np.lexsort((v, u))
    u, v = u[order], v[order]
    first = spill.starts(u, v)
    return u[first], v[first]


def _edges(folder: Location, part: int, parts: int, names: list[str]) -> Edges:
    u, v = spill.arrays(folder, names, *spill.share(part, parts), u=np.uint64, v=np.uint64)
    return unique((u, v))


def _starts(values: np.ndarray) -> np.ndarray:
    """Returns, for each value of a sorted array, the index of the first equal value."""
    first = spill.starts(values)
    return np.flatnonzero(first)[np.cumsum(first) - 1]


def _least(edges: Edges) -> np.ndarray:
    """Returns, for each edge, the smallest neighbor of the edge's first node. The edges must be sorted."""
    u, v = edges
    return v[_starts(u)] if len(u) else v


def _spilled(folder: Location, edges: Edges, both: bool) -> dict[str, object]:
    u, v = edges
    if both:
        u, v = unique((np.concatenate([u, v]), np.concatenate([v, u])))
    name = spill.write(folder, pa.table({"key": spill.mixed(u), "u": u, "v": v}), ("u", "v"))
    return {"edges_file": name, "files": [name]}
