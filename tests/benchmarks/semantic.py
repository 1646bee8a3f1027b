"""Measures the cost of `stage: semantic` without its model, and the planted near pairs that it finds, without Ray.

    python -m tests.benchmarks.semantic [--documents 20000] [--cells 1 5 20] [--dims 384]

Vectors are around 200 topics (cosines within one about 0.5), and a tenth of the documents have a partner with a cosine of 0.96 to
0.99. Prints, for each number of cells, the pairs that lose a document after one stage and after a second with another seed, the
CPU seconds of the first, and MiB above the process's earlier peak. Real embeddings have other neighborhoods, so a border splits
more or fewer pairs.
"""

from __future__ import annotations

import tempfile
import time

import numpy as np
import pyarrow as pa
from heliostat.curation.embedding import rounded
from heliostat.curation.engine import Curated
from heliostat.curation.segment import Spiller, survivors
from heliostat.curation.semantic.cells import packed
from heliostat.curation.stage import Document
from heliostat.curation.stages.semantic import Semantic
from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.work import Work

from tests.benchmarks import harness
from tests.unit.build_curation import HereFlow

TOPICS, NEAR = 200, 0.955
MEMORY = 256 << 20


def planted(count: int, dims: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns vectors, of which the first tenth have a partner in the second tenth, and the cosines of these pairs."""
    rng = np.random.default_rng(0)
    unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    topics = unit(rng.normal(size=(TOPICS, dims)))
    made = unit(topics[rng.integers(0, TOPICS, count)] + unit(rng.normal(size=(count, dims))))
    pairs = count // 10
    wanted = rng.uniform(NEAR + 0.005, 0.99, (pairs, 1))
    aside = rng.normal(size=(pairs, dims))
    aside = unit(aside - (aside * made[:pairs]).sum(1, keepdims=True) * made[:pairs])
    made[pairs : 2 * pairs] = wanted * made[:pairs] + np.sqrt(1 - wanted**2) * aside
    return rounded(made), wanted.ravel()


def embedded(here: HereFlow, found: Curated, vectors: np.ndarray) -> list[dict]:
    """Spills the vectors of the documents of runs, like the embedding task."""
    records = []
    for run in found.runs:
        table = pa.concat_tables(list(survivors(here.work.spill, run, columns=["id"])))
        which = np.array([int(id) for id in table["id"].to_pylist()])
        rows = pa.table({"key": table["key"], "row": table["row"], "vector": packed(vectors[which])})
        name = spill.write(here.work.spill, rows, ("row",))
        records.append({"vectors": [name], "rows": len(rows), "size": vectors.shape[1], "cut": 0})
    return records


def left(here: HereFlow, found: Curated) -> set[int]:
    return {int(id) for run in found.runs for t in survivors(here.work.spill, run, columns=["id"]) for id in t["id"].to_pylist()}


def measure(count: int, dims: int, cells: int) -> None:
    vectors, _ = planted(count, dims)
    with tempfile.TemporaryDirectory() as folder:
        here, found = HereFlow(Work(Location(folder)), again=0), Curated()
        out = Spiller(here.work.spill, 1 << 20)
        for i in range(count):
            out.add(Document(str(i), f"document {i}"))
        out.spill()
        found.runs = out.runs
        pairs, shares = count // 10, []
        before, start = harness.memory("VmHWM"), time.process_time()
        for number, seed in enumerate((1, 2)):
            stage = Semantic(model="none", min_similarity=NEAR, cell_documents=-(-count // cells), keep="first", seed=seed)
            found.runs = stage.decided(here, found, number, MEMORY, embedded(here, found, vectors))
            stay = left(here, found)
            shares.append(sum(not {i, i + pairs} <= stay for i in range(pairs)) / pairs)
            if not number:
                seconds = time.process_time() - start
        peak = harness.memory("VmHWM") - before
        harness.row(f"{count:,}", cells, f"{shares[0]:.1%}", f"{shares[1]:.1%}", f"{seconds:.1f}", f"{peak:.0f}")


def main() -> None:
    arguments = harness.arguments(__doc__, documents=[20_000], cells=[1, 5, 20], dims=384)
    harness.head("documents", "cells", "pairs found", "by a second stage", "CPU s", "MiB")
    for count in arguments.documents:
        for cells in arguments.cells:
            measure(count, arguments.dims, cells)


if __name__ == "__main__":
    main()
