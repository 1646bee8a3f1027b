"""Implements the tasks that compare documents by vectors: embedding, centers, cells, and the choice of the documents that stay.

The tasks exchange sorted temporary files, which are split by documents or by cells. For any number of documents, a task has only
some vectors in memory: those of one file, of a sample, or of a part of one cell. The centers are computed from the documents with
the lowest hashes. So the centers don't depend on how the documents are split into files.
"""

from __future__ import annotations

import heapq
import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from heliostat.curation.comparing import JUDGED, LARGEST, counted
from heliostat.curation.embedding import TextEmbedder
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

    `held`: the maximum number of vectors in memory. Don't rename this argument, because the keys of recorded tasks contain its
    name.
    """
    all_ = Dealt.read(folder, names, *spill.share(part, parts))
    judged, bins, largest, of_clusters = [JUDGED.empty_table()], dict[str, list[int]](), list[tuple[int, str]](), list[int]()
    whole = all_.vectors(0, len(all_.nodes)) if 0 < len(all_.nodes) <= held else None
    for begin, end in all_.cells():

        def read(start: int, stop: int, begin: int = begin, end: int = end) -> np.ndarray:
            first, last = begin + start, min(begin + stop, end)
            return all_.vectors(first, last) if whole is None else whole[first:last]

        near, best = vectors.sieve(read, end - begin, least, held)
        goes = best >= np.float32(least)
        gone, by = np.flatnonzero(goes) + begin, near[goes] + begin
        stayed, sizes = np.unique(by, return_counts=True)
        cluster_of = dict(zip(stayed.tolist(), zip(all_.ids(stayed), (sizes + 1).tolist(), strict=True), strict=True))
        judged.append(_judged(all_.nodes[gone], [cluster_of[place] for place in by.tolist()], best[goes]))
        of_clusters += [size for _, size in cluster_of.values()]
        largest = heapq.nsmallest(LARGEST, [*largest, *((-size, id) for id, size in cluster_of.values())])
        _count(bins, best, goes)
    name = spill.write(folder, pa.concat_tables(judged), ("reason",))
    largest_rows = [[-size, id] for size, id in largest]
    return {"judged": name, "clusters": len(of_clusters), "largest": largest_rows, "sizes": counted(of_clusters), "bins": bins,
            "files": [name]}  # fmt: skip


def _judged(nodes: np.ndarray, by: list[tuple[str, int]], cosines: np.ndarray) -> pa.Table:
    details = [f"{id} (one of {size})" for id, size in by]
    measures = [json.dumps({"similarity": round(cosine, 4)}) for cosine in cosines.tolist()]
    columns = [pa.array(nodes), pa.array([REASON] * len(nodes), pa.large_string()), pa.array(details, pa.large_string())]
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
    """Reads the documents of a range of cells, cell by cell, in the order in which heliostat compares them. Reads vectors on
    request, and keeps none in memory."""

    folder: Location
    names: list[str]
    table: pa.Table

    @classmethod
    def read(cls, folder: Location, names: list[str], low: int, high: int) -> Dealt:
        tables = [t.select(ABOUT.names) for t in spill.read_all(folder, names, low, high, ABOUT.names)]
        order = [(name, "ascending") for name in ABOUT.names]
        return cls(folder, names, pa.concat_tables([ABOUT.empty_table(), *tables]).sort_by(order).combine_chunks())

    @cached_property
    def nodes(self) -> np.ndarray:
        return self.table["node"].to_numpy()

    @cached_property
    def keys(self) -> np.ndarray:
        return self.table["key"].to_numpy()

    def ids(self, places: np.ndarray) -> list[str]:
        return self.table["id"].take(pa.array(places)).to_pylist()

    def cells(self) -> list[tuple[int, int]]:
        """Lists the first position of each cell's documents, and the position after the last."""
        starts = np.unique(self.keys, return_index=True)[1].tolist()
        return list(pairwise([*starts, len(self.nodes)]))

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """Reads the vectors of the documents at the positions `start` to `stop`, as an int8 array [documents, size]."""
        wanted = self.nodes[start:stop]
        order = np.argsort(wanted)
        out = None
        for name in self.names:
            for table in spill.read(self.folder, name, int(self.keys[start]), int(self.keys[stop - 1]) + 1, ["node", "vector"]):
                node, values = table["node"].to_numpy(), unpacked(table["vector"])
                at = np.minimum(np.searchsorted(wanted, node, sorter=order), len(wanted) - 1)
                place, here = order[at], wanted[order[at]] == node
                out = np.zeros((len(wanted), values.shape[1]), np.int8) if out is None else out
                out[place[here]] = values[here]
        assert out is not None
        return out
