"""Merges runs before shards are read out of them, where each shard would take little of each run: what keeps the cost linear.

A shard's task reads its range of keys out of every run. Runs and shards both grow with the input, so their product, which is how
often a run is opened and a row group of it is read for a few rows, grows with its square. Where a shard's part of a run is below
`LEAST`, ranges of many shards are therefore merged first: a task takes such a range out of some runs and writes it as one, as
large as a run may be. Afterwards a shard reads the runs of its own range alone, which have as many times more of it as runs were
merged, fifty or so; if that is not enough, ranges are merged again. A merge costs its bytes once: this is the external merge sort
of Knuth, The Art of Computer Programming, volume 3, section 5.4, but for the sorting of shards, which follows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.spill import SpilledRun, survivors
from heliostat.tasks.work import key

LEAST = spill.GROUP_BYTES // 4
"""Bytes of a shard in a run, below which a merge is less work than what reading takes beside them."""

MANY = 4096  # parts of runs that shards read: of fewer a merge would save no more than seconds
Bounds = Callable[[int, int], tuple[int, int]]  # the range of keys of shards [first, stop)


@dataclass(frozen=True)
class ShardRange:
    """Holds the runs that have the documents of shards [first, stop)."""

    first: int
    stop: int
    runs: list[SpilledRun]

    @property
    def part(self) -> float:
        """Returns the bytes that a shard has in a run, on average."""
        return sum(run.bytes for run in self.runs) / max(1, len(self.runs)) / (self.stop - self.first)


def merged(flow: Flow, runs: list[SpilledRun], shards: int, bounds: Bounds, run_bytes: int) -> list[ShardRange]:
    """Divides shards into ranges, each with runs of at most about `run_bytes` from which its shards can be read in one go."""
    ranges = [ShardRange(0, shards, runs)]
    while any(map(thin, ranges)):
        cut = [part for one in ranges if thin(one) for part in divided(one, run_bytes)]
        work = [merge_of(one, group, bounds, run_bytes) for one, size in cut for group in groups(one.runs, size)]
        records = iter(flow.all("merge", merge, iter(work)))
        whole = [one for one in ranges if not thin(one)]
        for one, size in cut:
            found = [SpilledRun(*run) for _ in groups(one.runs, size) for run in next(records)["runs"]]
            whole.append(ShardRange(one.first, one.stop, found))
        ranges = sorted(whole, key=lambda one: one.first)
    return ranges


def thin(one: ShardRange) -> bool:
    """Tells whether a shard has so little of each run that merging them is worth it."""
    return _thin(len(one.runs), one.stop - one.first, one.part)


def _thin(runs: int, shards: int, part: float) -> bool:
    return shards > 1 and runs * shards > MANY and part < LEAST


def divided(one: ShardRange, run_bytes: int) -> Iterator[tuple[ShardRange, int]]:
    """Yields smaller ranges of the same runs, of each of which a run has a row group or more, with how many runs to merge."""
    shards = one.stop - one.first
    parts, size = _divided(shards, one.part * shards, run_bytes)
    for part in range(parts):
        first, stop = (one.first + shards * at // parts for at in (part, part + 1))
        yield ShardRange(first, stop, one.runs), size


def _divided(shards: int, mean: float, run_bytes: int) -> tuple[int, int]:
    """Computes into how many ranges shards are divided whose runs have so many bytes on average, and how many runs to merge."""
    parts = min(shards, max(2, int(mean // spill.GROUP_BYTES)))
    return parts, max(2, int(run_bytes * parts // max(1, mean)))


def passes(runs: int, bytes: float, shards: int, run_bytes: int) -> int:
    """Computes how often so many bytes in runs would be merged for so many shards, if all runs are alike."""
    found = 0
    while _thin(runs, shards, bytes / runs / shards):
        parts, size = _divided(shards, bytes / runs, run_bytes)
        runs, bytes, shards, found = -(-runs // size), bytes / parts, -(-shards // parts), found + 1
    return found


def groups(runs: list[SpilledRun], size: int) -> Iterator[list[SpilledRun]]:
    for at in range(0, len(runs), size):
        yield runs[at : at + size]


def merge_of(one: ShardRange, runs: list[SpilledRun], bounds: Bounds, run_bytes: int) -> Task:
    """Makes the task that merges the range of some runs."""
    low, high = bounds(one.first, one.stop)
    told = {"runs": runs, "low": low, "high": high, "run_bytes": run_bytes}
    bytes = int(one.part * (one.stop - one.first) * len(runs))
    return Task(key("merge", [[run.name, run.decided] for run in runs], low, high, run_bytes), told, bytes=bytes)


def merge(folder: Location, runs: list[SpilledRun], low: int, high: int, run_bytes: int) -> dict[str, object]:
    """Writes the documents of a range of keys that some runs hold as one run, or as more where a key has very many."""
    made, held, size = list[tuple[str, int, int]](), list[pa.Table](), 0
    for run in runs:
        for table in survivors(folder, run, low, high):
            held.append(table)
            size += table.nbytes
            if size > 2 * run_bytes:
                made.append(_written(folder, held))
                size = 0
    if held:
        made.append(_written(folder, held))
    return {"runs": made, "files": [name for name, *_ in made]}


def _written(folder: Location, held: list[pa.Table]) -> tuple[str, int, int]:
    """Spills tables as one run, with rows of its own if they have any, and empties the list."""
    table = pa.concat_tables(held)
    held.clear()
    bytes = int(table["bytes"].to_numpy().sum()) if "bytes" in table.column_names else table.nbytes
    if "row" in table.column_names:
        rows = pa.array(np.arange(len(table)), table.schema.field("row").type)
        table = table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), rows)
    return spill.write(folder, table, ("hash", "id")), len(table), bytes
