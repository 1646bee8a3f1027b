"""Sums how often each token occurs in the shards of a dataset.

A shard's task writes its counts to a temporary file, and tasks sum the files. A vocabulary of 128,000 tokens has 250 KB of counts
per shard, and 100 TB have hundreds of thousands of shards. So the driver must not read the counts of all shards.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.merging import groups
from heliostat.tasks.work import key

KIND = "token-counts"
SUMMED = 64  # files that a task sums


def store(folder: Location, counts: np.ndarray) -> str:
    """Writes the tokens that occur, with their counts, to a temporary file, and returns its name. `counts`: int64 [vocabulary
    size]."""
    (used,) = np.nonzero(counts)
    return spill.write_sorted(folder, pa.table({"key": used.astype(np.uint64), "count": counts[used]}))


def summed(flow: Flow, names: list[str], size: int) -> np.ndarray:
    """Sums the counts in temporary files (`store`), int64 [size]. If there are more than SUMMED files, Ray tasks sum parts of
    them first. `size`: the size of the vocabulary."""
    while len(names) > SUMMED:
        tasks = (Task(key(KIND, part, size), {"names": part, "size": size}) for part in groups(names, SUMMED))
        names = [record["counts"] for record in flow.all(KIND, sum_files, tasks)]
    return _total(flow.work.spill, names, size)


def sum_files(folder: Location, names: list[str], size: int) -> dict[str, object]:
    """Writes the sum of the counts in some temporary files to a temporary file."""
    name = store(folder, _total(folder, names, size))
    return {"counts": name, "files": [name]}


def _total(folder: Location, names: list[str], size: int) -> np.ndarray:
    total = np.zeros(size, np.int64)
    for table in spill.read_all(folder, names):
        total[table["key"].to_numpy()] += table["count"].to_numpy()
    return total
