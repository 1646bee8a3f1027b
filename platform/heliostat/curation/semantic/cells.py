"""Implements the tasks that compare documents by vectors: embedding, centers, cells, and the choice of the documents that stay.

The tasks exchange sorted temporary files, which are split by documents or by cells. For any number of documents, a task has only
some vectors in memory: those of one file, of a sample, or of a part of one cell. The centers are computed from the documents with
the lowest hashes. So the centers don't depend on how the documents are split into files.
"""

from __future__ import annotations

import heapq
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.curation.comparing import JUDGED, LARGEST, counted
from heliostat.curation.embedding import TextEmbedder
from heliostat.curation.engine import filled
from heliostat.curation.minhash.components import Edges
from heliostat.curation.minhash.keep import Rule, ranked
from heliostat.curation.segment import SpilledRun, survivors
from heliostat.curation.semantic import vectors
from heliostat.storage.locations import Location
from heliostat.tasks import shipping, spill
from heliostat.tasks.shipping import Shipment

TEXTS = 64  # texts that are embedded at once
OF_CELL = 256  # sampled documents per cell
SAMPLE_NUMBERS = 1 << 26  # approximate maximum of numbers in the sample's vectors, for any number of cells
REASON = "near_duplicate"
ABOUT = pa.schema(
    [("key", pa.uint64()), ("rank", pa.float64()), ("value", pa.large_string()), ("id", pa.large_string()), ("node", pa.uint64())]
)
ORDER = [(name, "ascending") for name in ABOUT.names]  # the order of comparison
OF_BLOCK = 64  # sampled documents per block of a large cell
JUDGED_ROWS = 1 << 16  # dropped documents per temporary file
ROW_BYTES = 400  # bytes of memory per document of a cell, in addition to its vector
NUMBER_BYTES = 16  # bytes of memory per number of a compared vector, with copies


@dataclass(frozen=True)
class EmbeddingModel:
    """Describes the embedding model: the files of the model's folder, the maximum tokens of a text, and the batch size."""

    files: Shipment
    max_tokens: int
    batch: int


@lru_cache(maxsize=1)
def _opened(model: EmbeddingModel, place: str) -> TextEmbedder:
    """Loads an embedding model. Caches the model, so that later tasks in the same process reuse it."""
    return TextEmbedder(place, model.max_tokens, model.batch)


def embed(folder: Location, run: SpilledRun, model: EmbeddingModel, most: int) -> dict[str, object]:
    """Computes the vectors of the documents in a temporary file. Writes the vectors to new temporary files of about `most` bytes,
    sorted by the documents' hashes."""
    embedder = _opened(model, shipping.here(folder, model.files))
    waiting, names, record = list[pa.Table](), list[str](), {"rows": 0, "size": 0, "cut": 0}
    for table in survivors(folder, run, columns=["text"]):
        for start in range(0, len(table), TEXTS):
            part = table.slice(start, TEXTS)
            batch = embedder(part["text"].to_pylist())
            vectors = np.stack([vector for vector, _ in batch])
            waiting.append(pa.table({"key": part["key"], "row": part["row"], "vector": packed(vectors)}))
            record = {
                "rows": record["rows"] + len(batch),
                "size": vectors.shape[1],
                "cut": record["cut"] + sum(c for _, c in batch),
            }
            if sum(map(len, waiting)) * vectors.shape[1] >= most:
                names.append(spill.write(folder, pa.concat_tables(waiting), ("row",)))
                waiting = []
    if waiting:
        names.append(spill.write(folder, pa.concat_tables(waiting), ("row",)))
    return {"vectors": names, "files": names, **record}


def packed(values: np.ndarray) -> pa.Array:
    """Converts an int8 array [rows, size] to an Arrow column with one byte string per row."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(values.shape[1]), len(values), [None, pa.py_buffer(values.tobytes())])


def unpacked(column: pa.ChunkedArray) -> np.ndarray:
    """Converts a column from `packed` back to an int8 array [rows, size]."""
    size = column.type.byte_width
    array = column.combine_chunks()
    start = array.offset * size
    return np.frombuffer(array.buffers()[1], np.int8)[start : start + len(array) * size].reshape(-1, size)


def sampled(rows: int, cells: int, size: int) -> int:
    """Returns the hash limit of the sample from which the centers are computed: the sample has the texts with hashes below the
    limit. `rows`: number of documents; `cells`: number of centers; `size`: numbers per vector."""
    wanted = max(cells, min(OF_CELL * cells, SAMPLE_NUMBERS // size))
    return min(spill.ALL, spill.ALL * wanted // rows)


def centres(folder: Location, names: list[str], limit: int, cells: int, seed: int) -> dict[str, object]:
    """Computes the centers of the cells, and writes them to a temporary file. Uses the texts with hashes below `limit`. Each
    distinct text counts once, and the order of the texts depends on `seed`.

    If no text has a hash below `limit`, because most texts are equal, there is only one cell.
    """
    samples = [_once(t) for t in spill.read_all(folder, names, 0, limit, ["vector"])]
    if not samples:
        samples = [next(spill.read(folder, names[0], columns=["vector"])).slice(0, 1)]
        cells = 1
    sample = _once(pa.concat_tables(samples))
    with np.errstate(over="ignore"):
        order = np.argsort(spill.mixed(sample["key"].to_numpy() + np.uint64(seed)))
    centroids = vectors.centres(unpacked(sample["vector"])[order], cells)
    name = spill.write(folder, pa.table({"key": np.arange(len(centroids), dtype=np.uint64), "vector": packed(centroids)}))
    return {"centres": name, "files": [name]}


def _once(table: pa.Table) -> pa.Table:
    """Returns a table with one row per key (the hash of a text), because equal texts have equal vectors."""
    return table.take(pa.array(np.unique(table["key"].to_numpy(), return_index=True)[1]))


def deal(
    folder: Location, number: int, run: SpilledRun, vectors_name: str, rule: Rule, column: str, centres: str | None
) -> dict[str, object]:
    """Assigns the documents of a temporary file to cells. Writes the documents' vectors, and the values that `rule` compares, to
    a new temporary file, sorted by cell. `number`: the number of `run` among all runs; `vectors_name`: the file of the documents'
    vectors."""
    whole = pa.concat_tables(spill.read(folder, vectors_name)).sort_by("row")
    rows, points = whole["row"].to_numpy(), unpacked(whole["vector"])
    middle = unpacked(pa.concat_tables(spill.read(folder, centres))["vector"]) if centres else None
    cells = np.zeros(len(rows), np.int64) if middle is None else vectors.nearest(points, middle)
    low, high, tables = pc.min(whole["key"]).as_py(), pc.max(whole["key"]).as_py() + 1, []
    for part in survivors(folder, run, low, high, ["id", "bytes", "columns"]):
        part = part.filter(pa.array(np.isin(part["row"].to_numpy(), rows)))
        at = np.searchsorted(rows, part["row"].to_numpy())
        ranks, values = ranked(part, rule, column)
        node = (np.uint64(number) << np.uint64(32)) | part["row"].to_numpy().astype(np.uint64)
        texts = pa.array(values, pa.large_string())
        tables.append(pa.table({"key": key_of(cells[at]), "rank": ranks, "value": texts, "id": part["id"],
                                "node": node, "vector": packed(points[at])}))  # fmt: skip
    name = spill.write(folder, pa.concat_tables(tables), ("node",))
    return {"dealt": name, "files": [name]}


def key_of(cells: np.ndarray) -> np.ndarray:
    """Returns the 64-bit key of each cell. Temporary files are sorted by these keys."""
    return spill.mixed(cells.astype(np.uint64))


def judge(folder: Location, part: int, parts: int, names: list[str], least: float, held: int) -> dict[str, object]:
    """Chooses the documents that stay in each cell, and writes the dropped documents to temporary files. Covers the cells in one
    of `parts` equal ranges of keys. A document is dropped if an earlier document in the order of the rule stays and has a cosine
    similarity of at least `least`.

    `held`: the maximum number of vectors in memory. A cell with more documents is compared in blocks. Don't rename this argument,
    because the keys of recorded tasks contain its name.
    """
    files, bins, largest, of_clusters = list[str](), dict[str, list[int]](), list[tuple[int, str]](), Counter[int]()
    for dealt in Dealt.read(folder, names, *spill.share(part, parts), held):
        near, best = dealt.sieve(least, held)
        goes = best >= np.float32(least)
        gone, (stayed, of, sizes) = np.flatnonzero(goes), np.unique(near[goes], return_inverse=True, return_counts=True)
        ids = dealt.ids(stayed)
        details = pa.array([f"{id} (one of {size + 1})" for id, size in zip(ids, sizes.tolist(), strict=True)], pa.large_string())
        for at in range(0, len(gone), JUDGED_ROWS):
            some = slice(at, at + JUDGED_ROWS)
            table = _judged(dealt.nodes[gone[some]], details.take(pa.array(of[some])), best[gone[some]])
            files.append(spill.write(folder, table, ("reason",)))
        of_clusters.update((sizes + 1).tolist())
        largest = heapq.nsmallest(LARGEST, chain(largest, zip((-1 - sizes).tolist(), ids, strict=True)))
        _count(bins, best, goes)
    first, *further = files or [spill.write(folder, JUDGED.empty_table())]
    largest_rows, sizes_of = [[-size, id] for size, id in largest], counted(of_clusters.elements())
    return {"judged": first, "further": further, "clusters": of_clusters.total(), "largest": largest_rows, "sizes": sizes_of,
            "bins": bins, "files": [first, *further]}  # fmt: skip


def _judged(nodes: np.ndarray, details: pa.Array, cosines: np.ndarray) -> pa.Table:
    measures = [json.dumps({"similarity": round(cosine, 4)}) for cosine in cosines.tolist()]
    columns = [pa.array(nodes), pa.array([REASON] * len(nodes), pa.large_string()), details]
    return pa.Table.from_arrays([*columns, pa.array(measures, pa.large_string())], schema=JUDGED)


def _count(bins: dict[str, list[int]], best: np.ndarray, goes: np.ndarray) -> None:
    """Counts documents in a histogram, by their cosine similarity with the nearest kept document. Kept and dropped documents have
    separate counts."""
    for place, some in ((0, best[~goes]), (1, best[goes])):
        values, counts = np.unique(np.floor(some.astype(np.float64) * 100 + 1e-4), return_counts=True)
        for value, number in zip(values.tolist(), counts.tolist(), strict=True):
            bins.setdefault(f"{value / 100:.6g}", [0, 0])[place] += number


@dataclass(frozen=True)
class Dealt:
    """Describes the documents of some cells in the order in which heliostat compares them, by the documents' keys and nodes.
    Reads ids and vectors on request, and keeps none in memory."""

    folder: Location
    names: list[str]
    keys: np.ndarray
    nodes: np.ndarray

    @classmethod
    def read(cls, folder: Location, names: list[str], low: int, high: int, held: int) -> Iterator[Dealt]:
        """Yields the documents of a range of cells. Each item has complete cells, whose documents take at most as much memory as
        `held` vectors, or one larger cell."""
        counts = [np.unique(t["key"].to_numpy(), return_counts=True) for t in spill.read_all(folder, names, low, high, [])]
        if not counts:
            return
        keys, of = np.unique(np.concatenate([key for key, _ in counts]), return_inverse=True)
        sizes = np.bincount(of, np.concatenate([count for _, count in counts])).astype(np.int64)
        vector = next(table["vector"] for name in names for table in spill.read(folder, name, low, high, ["vector"]))
        room = max(1, held * NUMBER_BYTES * vector.type.byte_width // ROW_BYTES)
        del vector
        for cells in filled(zip(keys.tolist(), sizes.tolist(), strict=True), lambda cell: cell[1], room):
            (first, _), (last, _), rows = cells[0], cells[-1], sum(size for _, size in cells)
            yield cls(
                folder, names, *map(np.concatenate, zip(*_ordered(folder, names, first, last + 1, rows, room), strict=True))
            )

    def ids(self, places: np.ndarray) -> list[str]:
        """Reads the ids of the documents at these positions. `places`: in ascending order."""
        wanted, ids = self.nodes[places], [""] * len(places)
        order = np.argsort(wanted)
        for table in self._tables(int(self.keys[0]), int(self.keys[-1]), ["node", "id"]) if len(places) else ():
            at, which = _places(wanted, order, table["node"].to_numpy())
            for place, id in zip(at.tolist(), table["id"].take(pa.array(which)).to_pylist(), strict=True):
                ids[place] = id
        return ids

    def cells(self) -> list[tuple[int, int]]:
        """Lists the first position of each cell's documents, and the position after the last."""
        return list(pairwise([*np.flatnonzero(spill.starts(self.keys)).tolist(), len(self.nodes)]))

    def sieve(self, least: float, held: int) -> tuple[np.ndarray, np.ndarray]:
        """Compares the documents of each cell. Returns what `vectors.sieve` returns, with positions among all documents."""
        near, best = np.full(len(self.nodes), -1, np.int64), np.zeros(len(self.nodes), np.float32)
        whole = self.vectors(0, len(self.nodes)) if len(self.nodes) <= held else None
        for begin, end in self.cells():

            def read(start: int, stop: int, begin: int = begin, end: int = end) -> np.ndarray:
                first, last = begin + start, min(begin + stop, end)
                return self.vectors(first, last) if whole is None else whole[first:last]

            place, best[begin:end] = vectors.sieve(read, end - begin, least, held)
            near[begin:end] = np.where(place >= 0, place + begin, -1)
        return near, best

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """Reads the vectors of the documents at the positions `start` to `stop`, as an int8 array [documents, size]."""
        wanted = self.nodes[start:stop]
        order = np.argsort(wanted)
        out = None
        for table in self._tables(int(self.keys[start]), int(self.keys[stop - 1]), ["node", "vector"]):
            values = unpacked(table["vector"])
            place, which = _places(wanted, order, table["node"].to_numpy())
            out = np.zeros((len(wanted), values.shape[1]), np.int8) if out is None else out
            out[place] = values[which]
        assert out is not None
        return out

    def _tables(self, first: int, last: int, columns: list[str]) -> Iterator[pa.Table]:
        return spill.read_all(self.folder, self.names, first, last + 1, columns)


def _places(wanted: np.ndarray, order: np.ndarray, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds the `nodes` that are in `wanted`. Returns their positions in `wanted`, and in `nodes`. `order`: the positions of
    `wanted` in ascending order of values."""
    at = order[np.minimum(np.searchsorted(wanted, nodes, sorter=order), len(wanted) - 1)]
    which = np.flatnonzero(wanted[at] == nodes)
    return at[which], which


def _ordered(folder: Location, names: list[str], low: int, high: int, rows: int, room: int) -> Iterator[Edges]:
    """Yields the keys and nodes of the documents in a range of keys, in the order of comparison. Reads all `rows` documents at
    once if they are at most `room`. Otherwise reads the files once for each block of about `room` documents."""
    pivots = _pivots(folder, names, low, high, -(-rows // room), rows) if rows > room else []
    for after, until in pairwise([None, *pivots, None]):
        tables = [ABOUT.empty_table()]
        for table in spill.read_all(folder, names, low, high, ABOUT.names):
            which = np.ones(len(table), bool) if until is None else _before(table, until)
            which &= True if after is None else ~_before(table, after)
            tables.append(table.select(ABOUT.names).filter(pa.array(which)))
        block = pa.concat_tables(tables).sort_by(ORDER)
        tables.clear()
        yield block["key"].to_numpy(), block["node"].to_numpy()


def _pivots(folder: Location, names: list[str], low: int, high: int, blocks: int, rows: int) -> list[dict[str, Any]]:
    """Chooses the documents at which `blocks` blocks of about the same size begin, from a sample of the `rows` documents in a
    range of keys."""
    limit, tables = min(spill.ALL - 1, spill.ALL * blocks * OF_BLOCK // rows), list[pa.Table]()
    for table in spill.read_all(folder, names, low, high, ABOUT.names):
        tables.append(table.select(ABOUT.names).filter(pa.array(spill.mixed(table["node"].to_numpy()) < np.uint64(limit))))
    sample = pa.concat_tables(tables).sort_by(ORDER)
    return sample.take(pa.array(np.arange(1, blocks) * len(sample) // blocks)).to_pylist() if len(sample) >= blocks else []


def _before(table: pa.Table, pivot: dict[str, Any]) -> np.ndarray:
    """Returns whether each document comes before the document `pivot` in the order of comparison, bool [documents]."""
    before, equal = np.zeros(len(table), bool), np.ones(len(table), bool)
    for name, _ in ORDER:
        value = pa.scalar(pivot[name], table.schema.field(name).type)
        before |= equal & pc.less(table[name], value).to_numpy()
        equal &= pc.equal(table[name], value).to_numpy()
    return before
