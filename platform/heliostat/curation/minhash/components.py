"""Finds exactly the connected components of a graph of documents, with the edges on disk. It alternates two operations on the
edges, large star and small star.

(Kiveris, Lattanzi, Mirrokni, Rastogi and Vassilvitskii, Connected Components in MapReduce and Beyond, 2014.) A node is a
document, numbered by its run and row (`run << 32 | row`). A large star connects every larger neighbor of a node to the smallest
node in its neighborhood; a small star connects every smaller neighbor and the node itself. When neither changes an edge, every
component is a star around its smallest node. That takes O(log^2 n) rounds; in practice, only a few. In each round, a task has the
edges of its share of the nodes in memory.
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
    """Joins the runs' spills into about `parts` spills, so that a task doesn't need to read from the spill of every run.
    `signed`: the name of each run's spill, and its number of rows.

    The column `row` becomes `node`, the place of the document.
    """
    share, work, first = -(-sum(rows for _, rows in signed) // parts), list[Task](), 0
    for group in filled(signed, lambda one: one[1], share):
        names = [name for name, _ in group]
        work.append(Task(key(first, names), {"first": first, "names": names}))
        first += len(group)
    return [r["gathered"] for r in flow.all(f"{kind}-gather", gather, iter(work)) if r["gathered"]]


def gather(folder: Location, first: int, names: list[str]) -> dict[str, object]:
    """Spills the joined spills of some runs, with documents' places instead of rows. `first`: the number of the first run."""
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
    """Spills edges, in both directions, between each document with a key of this part and the smallest document with the same
    key."""
    keys, nodes = spill.arrays(folder, names, *spill.share(part, parts), key=np.uint64, node=np.uint64)
    order = np.lexsort((nodes, keys))
    keys, nodes = keys[order], nodes[order]
    least = nodes[_starts(keys)] if len(keys) else nodes
    return _spilled(folder, unique((nodes, least)), both=True)


def large_star(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, object]:
    """Connects the larger neighbors of each node of this part to the smallest node in the node's neighborhood. The record
    contains a checksum of the edges, which shows whether a round changed any edge."""
    u, v = edges = _edges(folder, part, parts, names)
    down = u > v
    with np.errstate(over="ignore"):
        check = int(spill.mixed(spill.mixed(u[down]) + v[down]).sum(dtype=np.uint64))
    least = np.minimum(u, _least(edges))
    up = v > u
    return _spilled(folder, unique((v[up], least[up])), both=False) | {"check": str(check), "edges": int(down.sum())}


def small_star(folder: Location, part: int, parts: int, names: list[str]) -> dict[str, object]:
    """Connects each node of this part, and the node's smaller neighbors, to the smallest of these neighbors."""
    u, v = edges = _edges(folder, part, parts, names)
    least = _least(edges)
    return _spilled(folder, unique((np.concatenate([u, v]), np.concatenate([least, least]))), both=True)


def stars(flow: Flow, kind: str, names: list[str], parts: int) -> tuple[list[str], int]:
    """Runs rounds until no edge changes. Returns the spills of the edges, which then form stars, and the number of rounds."""
    before: tuple[int, int] | None = None
    for rounds in range(ROUNDS):
        large = flow.all(f"{kind}-large", large_star, by_parts(flow, kind, parts, names))
        now = (sum(r["edges"] for r in large), sum(int(r["check"]) for r in large) % (1 << 64))
        if now == before:
            return names, rounds
        small = flow.all(f"{kind}-small", small_star, by_parts(flow, kind, parts, [r["edges_file"] for r in large]))
        before, names = now, [r["edges_file"] for r in small]
    raise HeliostatError(f"{kind}: the clusters didn't converge within {ROUNDS} rounds")


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
    """Returns the start of each group of equal values in a sorted array."""
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
