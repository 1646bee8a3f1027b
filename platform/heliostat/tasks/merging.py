"""Merges temporary files if later tasks would otherwise each read few rows of very many files. So the cost stays linear.

A later task reads its range of keys from every file of the earlier tasks. The number of later tasks and the number of files both
grow with the input. The number of reads is the product of both numbers, so it grows with the square of the input. Merging the
ranges of many tasks first costs one more pass over the data. This is the external merge sort of Knuth (The Art of Computer
Programming, volume 3, section 5.4), except that the later tasks sort.

- Files of documents (runs), before shards (`merged`): if a shard's rows in a run have less than `LEAST` bytes, a task merges some
  runs. The task reads the range of many shards from these runs, and writes this range as one run, as large as a run may be.
  Afterwards a shard reads only the runs of its own range. Each of these runs has about fifty times more of the shard's rows. If
  that isn't enough, ranges are merged again.
- Files of the values by which documents are compared, and of the record of documents (`by_parts`): the same passes, if there are
  more than `MANY_RANGES` reads, or if a task would read more than `MOST_FILES` files. Each pass reads about `GROUP_BYTES` or more
  per request. So the number of requests grows with the bytes, times the number of passes, which grows with the logarithm of the
  input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice, starmap
from math import ceil, log
from operator import itemgetter
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import pyarrow as pa

from heliostat.storage.locations import Location
from heliostat.tasks import spill
from heliostat.tasks.clusters import CountedTasks
from heliostat.tasks.flow import Flow, Task
from heliostat.tasks.pool import TaskFunction
from heliostat.tasks.spill import SpilledRun, survivors_of
from heliostat.tasks.work import key, keys

LEAST = spill.GROUP_BYTES // 4
"""Bytes of a shard in a temporary file of documents, below which a merge is less work than reading the rest of the row groups."""

MANY = 4096  # number of parts of runs that shards read; if there are fewer, a merge would save only seconds
SPARE = 2  # factor by which merges exceed LEAST, because the sizes of files differ, and another pass costs all bytes
MOST_FILES = 1024  # maximum files that a task merges: about 8 seconds of requests to a store
MOST_SPILLS = 256  # the same for files other than documents, whose merges are short steps
READ_AS_LONG = 340_000
"""Bytes whose merging takes as long as a read with its footer: 2 ms of a CPU, and two answers of a store, 16 at a time."""

HELD = 8  # a merge of files other than documents holds 1 / HELD of the tasks' memory
MANY_RANGES = 1 << 20  # reads of a range from a spill: this many cost about 16 CPU minutes, or 50 cents for a store's requests
Item = TypeVar("Item")
Bounds = Callable[[int, int], tuple[int, int]]  # maps shards [first, stop) to their range of keys


@dataclass(frozen=True)
class ShardRange:
    """Lists the temporary files with the documents of shards [first, stop)."""

    first: int
    stop: int
    runs: list[SpilledRun]

    @cached_property
    def part(self) -> float:
        """Returns the mean number of bytes that one shard has in one of the temporary files."""
        return sum(run.bytes for run in self.runs) / max(1, len(self.runs)) / (self.stop - self.first)


CutRange = tuple[ShardRange, int, float]
"""A smaller range with the same files, the number of files to merge into one, and the mean bytes of a shard in a file."""


def merged(flow: Flow, runs: list[SpilledRun], shards: int, bounds: Bounds, run_bytes: int) -> list[ShardRange]:
    """Divides shards into ranges, and merges each range's temporary files until each shard can be read efficiently (`thin`).

    A merged file has at most about `run_bytes` bytes. Returns the ranges in ascending order.
    """
    return _passes(flow, "merge", merge, [ShardRange(0, shards, runs)], bounds, run_bytes, MANY, MOST_FILES)


def _passes(flow: Flow, kind: str, function: TaskFunction, ranges: list[ShardRange], bounds: Bounds, run_bytes: int,
            many: int, most_files: int) -> list[ShardRange]:  # fmt: skip
    while any(thin(one, many) for one in ranges):
        cut = [part for one in ranges if thin(one, many) for part in divided(one, run_bytes, many, most_files)]
        work = CountedTasks(_merges(flow, cut, bounds, run_bytes), sum(-(-len(one.runs) // size) for one, size, _ in cut))
        merged_files = iter(flow.taken(kind, function, work, itemgetter("runs")))
        whole = [one for one in ranges if not thin(one, many)]
        for block in _blocks(cut):
            one, size, _ = block[0]
            of_groups = [list(islice(merged_files, len(block))) for _ in groups(one.runs, size)]
            for (one, *_), files in zip(block, zip(*of_groups, strict=True), strict=True):
                whole.append(ShardRange(one.first, one.stop, [SpilledRun(*run) for some in files for run in some]))
        ranges = sorted(whole, key=lambda one: one.first)
    return ranges


def thin(one: ShardRange, many: int | None = None) -> bool:
    """Checks whether merging the files of a range is worth its cost, because each file has only few bytes of a shard. `many`:
    number of reads below which a merge saves too little; by default, `MANY`."""
    return _thin(len(one.runs), one.stop - one.first, one.part, MANY if many is None else many)


def _thin(runs: int, shards: int, part: float, many: int) -> bool:
    return shards > 1 and part < LEAST and (runs * shards > many or runs > MOST_FILES)


def divided(one: ShardRange, run_bytes: int, many: int | None = None, most_files: int = MOST_FILES) -> Iterator[CutRange]:
    """Splits a range of shards into smaller ranges. Yields (smaller range with the same files, number of files to merge into
    one, mean bytes of a shard in a file). A smaller range has about one row group or more in each file."""
    shards = one.stop - one.first
    parts, size = _divided(len(one.runs), shards, one.part * shards, run_bytes, MANY if many is None else many, most_files)
    for part in range(parts):
        first, stop = (one.first + shards * at // parts for at in (part, part + 1))
        yield ShardRange(first, stop, one.runs), size, one.part


def _divided(runs: int, shards: int, mean: float, run_bytes: int, many: int, most_files: int = MOST_FILES) -> tuple[int, int]:
    """Computes (the number of smaller ranges, the number of files to merge into one). `mean`: mean bytes of a file; `many`: see
    `thin`.

    Enough parts that no further pass is needed, unless it saves more reads than its bytes are worth (READ_AS_LONG). All files of
    later passes have `run_bytes` bytes.
    """
    times = ceil(log(max(2.0, SPARE * LEAST * shards / run_bytes), _most(shards, mean)))
    while True:
        parts = _parts(shards, mean, run_bytes, times + 1)
        rest = -(-shards // parts)
        if not _thin(-(-runs // _group(parts, mean, run_bytes, most_files)), rest, run_bytes / rest, many):
            break  # no further pass would follow
        saved = _reads_of(shards, mean, run_bytes, times) - _reads_of(shards, mean, run_bytes, times + 1)
        if saved * READ_AS_LONG <= mean:
            break
        times += 1
    parts = _parts(shards, mean, run_bytes, times)
    return parts, _group(parts, mean, run_bytes, most_files)


def _group(parts: int, mean: float, run_bytes: int, most_files: int) -> int:
    """Returns the number of files of `mean` bytes to merge into one, if each range has a share of 1 / `parts` of their bytes."""
    return min(most_files, max(2, int(run_bytes * parts // max(1, mean))))


def _most(shards: int, mean: float) -> int:
    return min(shards, max(2, int(mean // spill.GROUP_BYTES)))


def _parts(shards: int, mean: float, run_bytes: int, times: int) -> int:
    """Returns the number of parts into which the first of `times` passes divides a range.

    Few parts make the reads of this pass larger, and many parts make the reads of later passes and of the shards larger. The sum
    is smallest if each pass and the shards have the same number of reads.
    """
    needed = max(2.0, SPARE * LEAST * shards / run_bytes)
    fewest = (shards * (mean / run_bytes) ** times) ** (1 / (times + 1))
    return min(_most(shards, mean), ceil(max(needed ** (1 / times), fewest)))


def _reads_of(shards: int, mean: float, run_bytes: int, times: int) -> float:
    """Returns how often `times` passes and the shards read a file of `mean` bytes, or the rows that the passes merge from it."""
    parts = _parts(shards, mean, run_bytes, times)
    rest = -(-shards // parts)
    return parts + mean / run_bytes * (_reads_of(rest, run_bytes, run_bytes, times - 1) if times > 1 else rest)


def passes(runs: int, bytes: float, shards: int, run_bytes: int) -> int:
    """Computes the number of merge passes over `bytes` bytes in `runs` files of equal size, for `shards` shards."""
    count = 0
    while _thin(runs, shards, bytes / runs / shards, MANY):
        parts, size = _divided(runs, shards, bytes / runs, run_bytes, MANY)
        runs, bytes, shards, count = -(-runs // size), bytes / parts, -(-shards // parts), count + 1
    return count


def groups(items: list[Item], size: int) -> Iterator[list[Item]]:
    for at in range(0, len(items), size):
        yield items[at : at + size]


def _blocks(cut: list[CutRange]) -> Iterator[list[CutRange]]:
    """Yields the ranges that have the same files."""
    return (list(block) for _, block in groupby(cut, lambda part: id(part[0].runs)))


def _merges(flow: Flow, cut: list[CutRange], bounds: Bounds, run_bytes: int) -> Iterator[Task]:
    """Yields the tasks that merge ranges of shards, from some temporary files each. `cut`: see `divided`.

    Consecutive tasks merge different ranges of the same files. So the list of these files is digested once, sent to a node once,
    and one call can run several of the tasks: with hundreds of names per task, this decides how many tasks per second the driver
    can start.
    """
    for block in _blocks(cut):
        for group in groups(block[0][0].runs, block[0][1]):
            shared, key_of = {"runs": flow.share(group)}, keys("merge", [[run.name, run.decided] for run in group])
            for one, _, part in block:
                low, high = bounds(one.first, one.stop)
                arguments = {"low": low, "high": high, "run_bytes": run_bytes}
                bytes = int(part * (one.stop - one.first) * len(group))
                yield Task(key_of(low, high, run_bytes), arguments, shared, bytes)


def merge(folder: Location, runs: list[SpilledRun], low: int, high: int, run_bytes: int) -> dict[str, object]:
    """Writes the documents of some temporary files in a range of keys as one file, or as several files if they exceed `run_bytes`
    by far."""
    files = [_written(folder, table) for table in _tables(folder, runs, low, high, run_bytes)]
    return {"runs": files, "files": [name for name, *_ in files]}


def merge_spills(folder: Location, runs: list[SpilledRun], low: int, high: int, run_bytes: int) -> dict[str, object]:
    """Writes the rows of some temporary files in a range of keys like `merge`. Rows with the same key keep their order. The bytes
    in the record are those of the files."""
    tables = _tables(folder, runs, low, high, run_bytes)
    files = [(name := spill.write(folder, table), len(table), spill.size_of(name) or 0) for table in tables]
    return {"runs": files, "files": [name for name, *_ in files]}


def _tables(folder: Location, runs: list[SpilledRun], low: int, high: int, run_bytes: int) -> Iterator[pa.Table]:
    """Yields the rows of some temporary files in a range of keys, in tables of little more than twice `run_bytes` at most."""
    tables, size = list[pa.Table](), 0
    for table in survivors_of(folder, runs, low, high):
        tables.append(table)
        size += table.nbytes
        if size > 2 * run_bytes:
            yield _joined(tables)
            size = 0
    if tables:
        yield _joined(tables)


def _joined(tables: list[pa.Table]) -> pa.Table:
    """Joins tables, and empties the list, so that memory has the rows once."""
    table = pa.concat_tables(tables)
    tables.clear()
    return table


def _written(folder: Location, table: pa.Table) -> tuple[str, int, int]:
    """Writes a table as one temporary file. If the table has a column `row`, renumbers the rows in this column."""
    bytes = int(table["bytes"].to_numpy().sum()) if "bytes" in table.column_names else table.nbytes
    if {"row", "hash"} <= {*table.column_names}:
        rows = pa.array(np.arange(len(table)), table.schema.field("row").type)
        table = table.set_column(table.schema.get_field_index("row"), table.schema.field("row"), rows)
    order = tuple(name for name in ("hash", "id") if name in table.column_names)
    return spill.write(folder, table, order), len(table), bytes


def exchanged(flow: Flow, kind: str, names: list[str], ranges: list[tuple[int, int]]) -> Iterator[tuple[str, object, int]]:
    """Yields, for each range of keys, the names of the temporary files that the range's task reads. Each item is (a digest of
    these names, a Ray reference to these names, the bytes that the task reads, by the mean of all ranges with the same files). If
    there are many files, merges them first.

    `ranges`: [low, high) of keys, ascending.
    """
    whole = [ShardRange(0, len(ranges), [SpilledRun(name, 0, spill.size_of(name) or 0) for name in names])]
    run_bytes = max(sum(run.bytes for run in whole[0].runs) // max(1, len(ranges)), flow.memory // HELD)

    def bounds(first: int, stop: int) -> tuple[int, int]:
        return ranges[first][0], ranges[stop - 1][1]

    for one in _passes(flow, f"{kind}-merge", merge_spills, whole, bounds, run_bytes, MANY_RANGES, MOST_SPILLS):
        some = [run.name for run in one.runs]
        shared = key(some), flow.share(some), int(one.part * len(some))
        yield from (shared for _ in range(one.first, one.stop))


def by_parts(flow: Flow, kind: str, parts: int, names: list[str], others: Mapping[str, list[str]] = MappingProxyType({}),
             **more: object) -> CountedTasks:  # fmt: skip
    """Returns one task for each of `parts` equal ranges of keys. A task reads the rows of its range from the temporary files
    `names`.

    `others`: additional temporary files that a task reads, by the name of the task's argument.
    """
    spills, ranges = {"names": names, **others}, [spill.share(part, parts) for part in range(parts)]
    exchanged_spills = [exchanged(flow, kind, some, ranges) for some in spills.values()]

    def task(part: int, names_of_part: tuple[tuple[str, object, int], ...]) -> Task:
        follows, names, bytes = zip(*names_of_part, strict=True)
        shared = dict(zip(spills, names, strict=True))
        return Task(key(follows, part, parts, more), {"part": part, "parts": parts, **more}, shared, sum(bytes))

    return CountedTasks(starmap(task, enumerate(zip(*exchanged_spills, strict=True))), parts)
