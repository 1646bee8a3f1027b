"""Merges what tasks have spilled, where later tasks would each read a little of very many files: what keeps the cost linear.

A later task reads its range of keys out of every file of the earlier ones. Both grow with the input. So their product, which is
how often a file is opened for a few rows, grows with its square. Therefore ranges of many tasks are merged first, and a merge
costs its bytes once. This is the external merge sort of Knuth (The Art of Computer Programming, volume 3, section 5.4), except
that the tasks that follow sort.

- Runs of documents, before shards (`merged`): where a shard's part of a run is below `LEAST`, a task takes a range of many shards
  out of some runs and writes it as one, as large as a run may be. Afterwards a shard reads the runs of its own range alone, which
  have fifty times more of it or so. If that is not enough, ranges are merged again.
- Spills of what documents are compared by (`by_parts`): above `MANY_RANGES`, wider ranges are merged, as many as the root of the
  number of ranges, each out of so many spills as have one task's rows in it. What is opened then grows with the power of 1.5, for
  one more pass over the spills. No task holds more than without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import isqrt
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import pyarrow as pa

from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.spill import SpilledRun, survivors
from heliostat.tasks.work import key

LEAST = spill.GROUP_BYTES // 4
"""Bytes of a shard in a run, below which a merge is less work than the rest of reading."""

MANY = 4096  # parts of runs that shards read: of fewer a merge would save no more than seconds
MANY_RANGES = 1 << 16  # ranges of spills: so many cost about a minute of a CPU, or 3 cents of a store's requests
Item = TypeVar("Item")
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
            merged_runs = [SpilledRun(*run) for _ in groups(one.runs, size) for run in next(records)["runs"]]
            whole.append(ShardRange(one.first, one.stop, merged_runs))
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
    """Computes how often so many bytes in runs would be merged for so many shards, if all runs have the same size."""
    count = 0
    while _thin(runs, shards, bytes / runs / shards):
        parts, size = _divided(shards, bytes / runs, run_bytes)
        runs, bytes, shards, count = -(-runs // size), bytes / parts, -(-shards // parts), count + 1
    return count


def groups(items: list[Item], size: int) -> Iterator[list[Item]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


def merge_of(one: ShardRange, runs: list[SpilledRun], bounds: Bounds, run_bytes: int) -> Task:
    """Makes the task that merges the range of some runs."""
    low, high = bounds(one.first, one.stop)
    arguments = {"runs": runs, "low": low, "high": high, "run_bytes": run_bytes}
    bytes = int(one.part * (one.stop - one.first) * len(runs))
    return Task(key("merge", [[run.name, run.decided] for run in runs], low, high, run_bytes), arguments, bytes=bytes)


def merge(folder: Location, runs: list[SpilledRun], low: int, high: int, run_bytes: int) -> dict[str, object]:
    """Writes the documents of a range of keys that some runs hold as one run, or as more where a key has very many."""
    files, tables, size = list[tuple[str, int, int]](), list[pa.Table](), 0
    for run in runs:
        for table in survivors(folder, run, low, high):
            tables.append(table)
            size += table.nbytes
            if size > 2 * run_bytes:
                files.append(_written(folder, tables))
                size = 0
    if tables:
        files.append(_written(folder, tables))
    return {"runs": files, "files": [name for name, *_ in files]}


def _written(folder: Location, tables: list[pa.Table]) -> tuple[str, int, int]:
    """Spills tables as one run, with rows of its own if they have any, and empties the list."""
    table = pa.concat_tables(tables)
    tables.clear()
    bytes = int(table["bytes"].to_numpy().sum()) if "bytes" in table.column_names else table.nbytes
    if "row" in table.column_names:
        rows = pa.array(np.arange(len(table)), table.schema.field("row").type)
        table = table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), rows)
    return spill.write(folder, table, ("hash", "id")), len(table), bytes


def exchanged(flow: Flow, kind: str, names: list[str], ranges: list[tuple[int, int]]) -> Iterator[tuple[str, object]]:
    """Yields for each of the ascending ranges of keys what its task is to read: what that follows from, and the spills' names,
    shared."""
    for some, count in _merged(flow, kind, names, ranges):
        shared = key(some), flow.share(some)
        yield from (shared for _ in range(count))


def by_parts(flow: Flow, kind: str, parts: int, names: list[str], beside: Mapping[str, list[str]] = MappingProxyType({}),
             **more: object) -> Iterator[Task]:  # fmt: skip
    """Describes one task for each part of all keys, over spills; `beside`: other spills that it reads, by the argument's name."""
    spills, ranges = {"names": names, **beside}, [spill.share(part, parts) for part in range(parts)]
    exchanged_spills = [exchanged(flow, kind, some, ranges) for some in spills.values()]
    for part, names_of_part in enumerate(zip(*exchanged_spills, strict=True)):
        shared = dict(zip(spills, (names for _, names in names_of_part), strict=True))
        follows = [follows for follows, _ in names_of_part]
        yield Task(key(follows, part, parts, more), {"part": part, "parts": parts, **more}, shared)


def _merged(flow: Flow, kind: str, names: list[str], ranges: list[tuple[int, int]]) -> list[tuple[list[str], int]]:
    """Returns the spills of some ranges, and how many ranges these are, for all of them in turn."""
    count, wide = len(ranges), isqrt(len(ranges))
    size = len(names) * wide // max(1, count)
    if len(names) * count <= MANY_RANGES or size < 2:
        return [(names, count)]
    edges = list(pairwise(count * at // wide for at in range(wide + 1)))
    parts_of = list(groups(names, size))

    def work() -> Iterator[Task]:
        for start, stop in edges:
            bounds = {"low": ranges[start][0], "high": ranges[stop - 1][1]}
            yield from (Task(key("merge", group, bounds), {"names": group, **bounds}) for group in parts_of)

    names_merged = [record["merged"] for record in flow.all(f"{kind}-merge", merge_spills, work())]
    parts = (names_merged[at : at + len(parts_of)] for at in range(0, len(names_merged), len(parts_of)))
    return [([name for name in part if name], stop - start) for part, (start, stop) in zip(parts, edges, strict=True)]


def merge_spills(folder: Location, names: list[str], low: int, high: int) -> dict[str, object]:
    """Spills what some spills have of a range of keys as one, if they have anything."""
    tables = [table for name in names for table in spill.read(folder, name, low, high)]
    if not tables:
        return {"merged": None, "files": []}
    name = spill.write(folder, pa.concat_tables(tables))
    return {"merged": name, "files": [name]}
